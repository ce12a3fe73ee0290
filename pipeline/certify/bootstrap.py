"""Percentile bootstrap over held-out rows (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_RESAMPLES = 2000
_LEVEL = 0.95
_SEED = 20261


@dataclass(frozen=True)
class Interval:
    """A mean over rows and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.1%} ({self.low:.1%} to {self.high:.1%})"


def interval(values: Sequence[float]) -> Interval:
    """The mean of at least one value (0 or 1 a row, or paired differences) and its 95 % interval; the seed is fixed."""
    import numpy as np

    sample = np.asarray(values, dtype=np.float64)
    chosen = np.random.default_rng(_SEED).integers(0, len(sample), (_RESAMPLES, len(sample)))
    low, high = np.quantile(sample[chosen].mean(axis=1), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Interval(float(sample.mean()), float(low), float(high))
