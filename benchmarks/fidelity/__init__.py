"""Does ZipVL keep the answers of pretrained models? ``python -m benchmarks.fidelity``."""
