"""Means with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy import special

from merge_rl.errors import TooFewSamplesError


@dataclass(frozen=True)
class Interval:
    """A mean of `count` values and its confidence interval [low, high]."""

    mean: float
    low: float
    high: float
    count: int

    def overlaps(self, other: Interval) -> bool:
        """Whether the two intervals share a point."""
        return self.low <= other.high and other.low <= self.high


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean and its two-sided Student interval, mean +- t_{n-1} s / sqrt(n), from n >= 2 values.

    s is the sample standard deviation (n - 1), `level` the coverage in (0, 1). Raises
    TooFewSamplesError for a single value.
    """
    count = len(values)
    if count < 2:
        raise TooFewSamplesError(f"an interval needs at least 2 values, got {count}")
    data = torch.tensor(values, dtype=torch.float64)
    mean = float(data.mean())
    quantile = float(special.stdtrit(count - 1, 0.5 + level / 2))
    half = quantile * float(data.std()) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def summarize_repeats(repeats: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """{metric: {reference: summary}} of repeats {metric: {reference: score}}; see `summarize`."""
    return {name: summarize([repeat[name] for repeat in repeats]) for name in repeats[0]}


def summarize(scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """{reference: summary}: mean, 95 % interval, minimum and the values of all repeats.

    The interval's ends are None where there is but one repeat: nothing tells its spread.
    """
    return {name: _summary([score[name] for score in scores]) for name in scores[0]}


def _summary(values: Sequence[float]) -> dict[str, Any]:
    bounds = mean_interval(values) if len(values) > 1 else None
    return {
        "mean": bounds.mean if bounds else values[0],
        "low": bounds.low if bounds else None,
        "high": bounds.high if bounds else None,
        "min": min(values),
        "values": values,
    }


def improvement(
    result: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]], name: str
) -> Interval:
    """95 % interval of the paired differences other - result of the score `name`; above 0: better.

    Repeats i of both have the same seeds, so that most of their noise cancels.
    """
    return mean_interval([b[name] - a[name] for a, b in zip(result, other, strict=True)])
