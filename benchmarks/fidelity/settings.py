"""The settings that are measured, by name."""

from __future__ import annotations

__all__ = ["DEFAULT", "FULL"]

DEFAULT = (
    "tau 0.975, drop",
    "default tau, window 512, full, text kept",
    "default tau, window 512, drop, text kept",
    "default tau, window 512, quantize, text kept",
)
"""What a CPU measures in a quarter of an hour beside dense: the paper's way, and the default's with each cache."""

FULL = (
    *DEFAULT,
    "tau 0.99, drop",
    "tau 0.975, full",
    "tau 0.975, quantize",
    "tau 0.975, all queries, drop",
    "tau 0.975, all queries, full",
    "tau 0.975, all queries, quantize",
    "tau 0.975, window 128, drop, text kept",
    "tau 0.975, window 128, full, text kept",
    "tau 0.975, window 128, quantize, text kept",
    "tau 0.975, window 256, full, text kept",
    "tau 0.975, window 512, drop, text kept",
    "tau 0.975, window 512, full, text kept",
    "tau 0.9, window 512, full, text kept",
    "tau 0.9, window 512, drop, text kept",
    "tau 0.9, window 512, quantize, text kept",
    "tau 0.95, window 512, full, text kept",
    "tau 0.95, window 512, drop, text kept",
    "tau 0.95, window 512, drop, text kept, stored 0.35",
    "tau 0.95, window 512, drop, text kept, stored 0.25",
    "tau 0.95, window 512, quantize, text kept",
    "tau 0.85, window 512, full, text kept",
    "tau 0.975, window 128, all queries, drop, text kept",
    "tau 0.975, window 128, all queries, full, text kept",
    "tau 0.975, window 128, all queries, quantize, text kept",
    "tau 0.95, window 128, all queries, first 2 dense, drop, text kept",
    "tau 0.95, window 128, all queries, first 2 dense, full, text kept",
    "tau 0.9, window 128, all queries, first 1 dense, full, text kept",
    "tau 0.9, window 512, quantize 4/4, text kept",
)
