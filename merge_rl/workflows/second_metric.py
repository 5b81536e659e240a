"""A second opinion on start and result: KID, where the real images' features were kept.

A search that lowers one distance may do so by what this distance does not see. KID compares all
pairs of features, not their first two moments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from merge_rl.core.intervals import Interval, mean_interval
from merge_rl.core.statistics import check_features
from merge_rl.errors import StatisticsError
from merge_rl.storage.reference import Reference
from merge_rl.workflows.metrics import MetricSource, Sample, kid_metric

NAME: Final = "kid"
MAX_ROWS: Final = 5000  # of either set: all pairs of rows are compared


class SecondMetric:
    """KID of features to a reference that keeps some of the real ones."""

    def __init__(self, reference: Reference, device: str) -> None:
        place = "cpu" if device.startswith("mps") else device  # which lacks float64
        source = MetricSource(name=NAME, reference=reference, device=place, max_rows=MAX_ROWS)
        self._device, self._metric = place, kid_metric(source)

    def score(self, features: Tensor) -> float:
        """Unbiased, lower is better, may be negative; NaN where a feature is not finite."""
        try:
            check_features(features, at_least=2)
        except StatisticsError:
            return float("nan")
        return self._metric(Sample(features.to(self._device)))[NAME]


@dataclass(frozen=True)
class SecondScores:
    """The second metric of start and result, repeat by repeat on the same seeds."""

    name: str
    scores: Mapping[str, Sequence[float]]  # "start", "result"

    def gain(self) -> Interval:
        """Paired interval of (start - result): above 0 the result is better."""
        pairs = zip(self.scores["start"], self.scores["result"], strict=True)
        return mean_interval([start - result for start, result in pairs])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        gain = self.gain()
        entries = {}
        for entry, values in self.scores.items():
            mean = mean_interval(values)
            entries[entry] = {
                "mean": mean.mean, "low": mean.low, "high": mean.high, "values": list(values),
            }  # fmt: skip
        return {
            "metric": self.name,
            "entries": entries,
            "gain_over_start": {"mean": gain.mean, "low": gain.low, "high": gain.high},
        }
