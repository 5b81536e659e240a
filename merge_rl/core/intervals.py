"""Means with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import special  # its statistics take a second to import

from merge_rl.errors import TooFewSamplesError


@dataclass(frozen=True)
class Interval:
    """A mean of `count` values with the bounds of its confidence interval."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def half_width(self) -> float:
        """Half of high - low."""
        return (self.high - self.low) / 2

    def overlaps(self, other: Interval) -> bool:
        """Whether the two intervals share a point."""
        return self.low <= other.high and other.low <= self.high


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean and its two-sided Student interval, mean +- t_{n-1} s / sqrt(n), from n >= 2 values."""
    count = len(values)
    if count < 2:
        raise TooFewSamplesError(f"an interval needs at least 2 values, got {count}")
    data = torch.tensor(values, dtype=torch.float64)
    mean = float(data.mean())
    quantile = float(special.stdtrit(count - 1, 0.5 + level / 2))
    half = quantile * float(data.std()) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)
