"""Intervals over pages, by bootstrap."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["bootstrap", "bootstrap_difference", "bootstrap_mean", "verdict"]

RESAMPLES, SEED = 10_000, 0


def bootstrap(right: list[bool]) -> tuple[float, float]:
    """The 95% percentile interval of the share of right pages.

    Drawing as many pages with replacement as there are makes the number of right ones binomial, which is what is drawn
    here. Pages that are all right, or all wrong, give an interval of no width.
    """
    n = len(right)
    shares = np.random.default_rng(SEED).binomial(n, sum(right) / n, RESAMPLES) / n
    low, high = np.percentile(shares, [2.5, 97.5])
    return round(float(low), 4), round(float(high), 4)


def bootstrap_difference(first: list[bool], second: list[bool]) -> tuple[float, float]:
    """The 95% percentile interval of how much larger the share of ``first`` is than that of ``second``, page by page.

    Raises:
        ValueError: they are not of the same pages.
    """
    if len(first) != len(second):
        raise ValueError(f"expected the same pages, got {len(first)} and {len(second)}")
    return bootstrap_mean(np.subtract(first, second, dtype=float))


def bootstrap_mean(values: Any) -> tuple[float, float]:
    """The 95% percentile interval of the mean of ``values``, an array of one dimension with few distinct values.

    Drawing as many with replacement as there are makes the counts of the distinct values multinomial, which is what is
    drawn here.
    """
    distinct, counts = np.unique(values, return_counts=True)
    n = int(counts.sum())
    drawn = np.random.default_rng(SEED).multinomial(n, counts / n, RESAMPLES)
    low, high = np.percentile(drawn @ distinct / n, [2.5, 97.5])
    return round(float(low), 4), round(float(high), 4)


def verdict(better: list[bool], worse: list[bool]) -> str:
    """Whether ``better`` is better, in words: by the two intervals, and by that of the difference page by page."""
    (low, high), (other_low, other_high) = bootstrap(better), bootstrap(worse)
    difference = bootstrap_difference(better, worse)
    if low > other_high:
        return "holds: the intervals do not overlap"
    if high < other_low:
        return "does NOT hold: the other way round, and the intervals do not overlap"
    if difference[0] > 0:
        return "holds page by page, but the two intervals overlap"
    if difference[1] < 0:
        return "does NOT hold: the other way round page by page, though the two intervals overlap"
    return "not decided: no difference beyond chance on these pages"
