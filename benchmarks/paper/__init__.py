"""The paper's tables and figures, measured on models/tiny-llava-next: ``python -m benchmarks.paper TABLE``."""
