"""95% intervals: of a share by Wilson, of a mean and of differences by bootstrap over samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["mean_interval", "paired_interval", "wilson"]

RESAMPLES, SEED, Z = 10_000, 0, 1.959964


def wilson(right: int, total: int) -> tuple[float, float]:
    """The interval of a share; [0, 1] of nothing."""
    if total == 0:
        return 0.0, 1.0
    share = right / total
    middle = (share + Z * Z / (2 * total)) / (1 + Z * Z / total)
    half = Z / (1 + Z * Z / total) * math.sqrt(share * (1 - share) / total + Z * Z / (4 * total * total))
    return round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The percentile interval of a mean, samples drawn with replacement.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("mean_interval: no values")
    drawn = np.random.default_rng(SEED).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.asarray(values, dtype=np.float64)[drawn].mean(1), [2.5, 97.5])
    return round(float(low), 5), round(float(high), 5)


def paired_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """The interval of how much larger the mean of ``first`` is, sample by sample.

    Raises:
        ValueError: there are no samples, or not as many of both.
    """
    if len(first) != len(second):
        raise ValueError(f"paired_interval: expected the same samples, got {len(first)} and {len(second)}")
    return mean_interval([float(a) - float(b) for a, b in zip(first, second, strict=True)])
