"""Tests of the CPU ops, the plans, the fakes and the integration with PyTorch. No GPU is needed."""
