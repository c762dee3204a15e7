"""95% intervals, of a share by Wilson, of a mean and of differences by bootstrap over samples; and upper limits of a
loss that hold for every number of samples.

A loss is in [0, 1] a sample. Where it is 0 or 1 the upper limit is Clopper's and Pearson's (Biometrika 26, 1934). Else
it is that of a bet against each mean in turn (Waudby-Smith and Ramdas, arXiv 2010.09686; Bates and others, arXiv
2101.02703, proposition 5), which takes losses that vary little for what they are and assumes no distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["attainable", "is_below", "mean_interval", "needed", "paired_interval", "upper", "wilson"]

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


def needed(bound: float, confidence: float) -> int:
    """The fewest samples, none of them lost, that show a loss of at most ``bound`` at this confidence."""
    return math.ceil(round(math.log1p(-confidence) / math.log1p(-bound), 9))


def attainable(samples: int, confidence: float) -> float:
    """The smallest loss that so many samples can show at this confidence, none of them lost; 1 of no samples."""
    return 1.0 if samples == 0 else -math.expm1(math.log1p(-confidence) / samples)


def is_below(losses: Sequence[float], bound: float, confidence: float) -> bool:
    """Whether these losses show at this confidence that the mean loss is at most ``bound``.

    Args:
        losses: one a sample, in [0, 1], in an order that does not depend on them.
        bound: in (0, 1).
    """
    if not losses:
        return False
    if _is_binary(losses):
        return _binomial_cdf(round(sum(losses)), len(losses), bound) <= (1 - confidence) * (1 + 1e-9)
    return _wealth(np.asarray(losses, dtype=np.float64), bound, confidence) >= -math.log1p(-confidence)


def upper(losses: Sequence[float], confidence: float) -> float:
    """The upper limit of the mean loss at this confidence: the smallest bound that ``is_below`` shows; 1 of nothing."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if is_below(losses, middle, confidence) else (middle, high)
    return high


def _is_binary(losses: Sequence[float]) -> bool:
    return all(loss in (0, 1) for loss in losses)


def _binomial_cdf(most: int, total: int, share: float) -> float:
    """The chance of at most ``most`` of ``total``, each with probability ``share`` in (0, 1)."""
    of_one = (math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(most + 1))
    odds, none = math.log(share) - math.log1p(-share), total * math.log1p(-share)
    return min(1.0, sum(math.exp(ways + k * odds + none) for k, ways in enumerate(of_one)))


def _wealth(losses: np.ndarray, bound: float, confidence: float) -> float:
    """The largest log of what a gambler owns who bets, sample by sample, that the mean loss is below ``bound``. If it
    is not, the chance that it ever exceeds ``1 / (1 - confidence)`` is at most ``1 - confidence``."""
    count = np.arange(1, len(losses) + 1)
    means = (0.5 + np.cumsum(losses)) / (1 + count)
    spread = (0.25 + np.cumsum((losses - means) ** 2)) / (1 + count)
    before = np.concatenate([[0.25], spread[:-1]])  # a bet knows the samples before it alone
    stakes = np.minimum(1.0, np.sqrt(-2 * math.log1p(-confidence) / (len(losses) * before)))
    return float(np.cumsum(np.log1p(stakes * (bound - losses))).max())
