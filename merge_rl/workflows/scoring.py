"""Scores of models on fresh seeds: several repeats, intervals, N beside every number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from merge_rl.core.distances import FrechetReference
from merge_rl.core.intervals import Interval, mean_interval
from merge_rl.core.statistics import FeatureStats, feature_stats

FeaturesOf = Callable[[int], Tensor]
"""repeat -> features (N, D) of that repeat's seeds."""


class Scorer:
    """Fréchet distances to the named references, e.g. "reference" and "heldout"."""

    def __init__(self, references: Mapping[str, FeatureStats]) -> None:
        self.references = {k: FrechetReference.from_stats(v) for k, v in references.items()}

    def score(self, features: Tensor) -> dict[str, float]:
        """Distance to each reference; NaN where a feature is not finite."""
        if not bool(features.isfinite().all()):
            return {name: float("nan") for name in self.references}
        stats = feature_stats(features)
        return {name: ref.distance(stats) for name, ref in self.references.items()}


def summarize(scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean, 95 % interval, minimum and values over repeats, for each reference."""
    summary = {}
    for name in scores[0]:
        values = [score[name] for score in scores]
        interval = mean_interval(values)
        summary[name] = {
            "mean": interval.mean,
            "low": interval.low,
            "high": interval.high,
            "min": min(values),
            "values": values,
        }
    return summary


def improvement(
    result: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]], name: str
) -> Interval:
    """Interval of the paired differences other - result: same seeds, so most noise cancels."""
    return mean_interval([b[name] - a[name] for a, b in zip(result, other, strict=True)])
