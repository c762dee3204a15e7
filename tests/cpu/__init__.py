"""Tests of the CPU ops, the fakes and the integration with PyTorch. No GPU is needed."""
