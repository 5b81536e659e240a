"""Scores of merges on seeds of their own, each written to the run as soon as it is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from torch import Tensor

from merge_rl.config import RULES, without_nan
from merge_rl.core.distances.frechet import FrechetReference
from merge_rl.core.distances.kernels import quadratic_distance
from merge_rl.core.distances.statistics import FeatureStats, check_features, feature_stats
from merge_rl.core.sampling.compatibility import balanced_labels
from merge_rl.errors import StatisticsError, about
from merge_rl.rng import image_seeds
from merge_rl.storage.runs import RunDir
from merge_rl.workflows.assembly import Job
from merge_rl.workflows.evaluate.metrics import MetricSource, Sample, kid_metric
from merge_rl.workflows.reference import Reference
from merge_rl.workflows.rollout import Failures, MergedRollout, WorkItem


@dataclass(frozen=True, eq=False)
class Request:
    """A score to know: of `count` images that coefficients (G, K) make of a stream of seeds."""

    key: str
    coefficients: Tensor
    count: int
    stream: tuple[str | int, ...]
    second: bool = False  # also by the metric that no search optimises


class ScoreStore:
    """FID to every reference, by key; a score that the run knows already is not made again.

    What the extractor's own failure cost its score is not kept in the run.
    """

    def __init__(self, job: Job, run: RunDir, seed: int, rules: int = RULES) -> None:
        self.job, self.run, self.seed, self.rules = job, run, seed, rules
        self.known, self._passing = run.scores(job.references), set[str]()
        self.scorer = Scorer({name: ref.stats for name, ref in job.references.items()})

    def get(
        self, key: str, coefficients: Tensor, count: int, *stream: str | int
    ) -> dict[str, float]:
        """One score; see `get_all`."""
        return self.get_all([Request(key, coefficients, count, stream)])[0]

    def get_all(
        self, requests: Sequence[Request], merged: MergedRollout | None = None
    ) -> list[dict[str, float]]:
        """Scores in order; from the file where they are known already.

        One after the other, each written at once; as many together as give every process a batch
        where there are several.
        """
        merged = merged or self.job.final_rollout
        missing = []
        for request in requests:
            if all(key in self.known for key in self._keys(request)):
                merged.rollout.on_images(request.count)
            else:
                missing.append(request)
        while missing:
            wanted = merged.processes * merged.rollout.batch
            step = max(1, wanted // missing[0].count) if merged.processes > 1 else 1
            self._make(missing[:step], merged)
            del missing[:step]
        return [self._read(request.key) for request in requests]

    def _make(self, requests: Sequence[Request], merged: MergedRollout) -> None:
        items = [
            WorkItem(
                request.coefficients,
                image_seeds(request.count, self.seed, *request.stream, rules=self.rules),
                balanced_labels(request.count, self.job.num_classes),
            )
            for request in requests
        ]
        made = merged.features_of(items, f"score {requests[0].key}")
        for request, features in zip(requests, made, strict=True):
            found = {request.key: without_nan(self.scorer.score(features))}
            if failures := Failures.of(features):
                found[f"failed/{request.key}"] = dict(vars(failures))
            for key in self._keys(request)[1:]:
                found[key] = without_nan({"reference": self.second_metric.score(features)})
            if failures.features:  # made again where the run goes on: it may be mended by then
                self._passing |= found.keys()
            self.known |= found
        kept = {key: value for key, value in self.known.items() if key not in self._passing}
        self.run.write("scores.json", kept)

    def failures(self, prefix: str) -> Failures:
        """Of all scores known whose keys begin so."""
        found = [v for k, v in self.known.items() if k.startswith(f"failed/{prefix}")]
        names = ("samples", "features", "count")
        return Failures(*(int(sum(value[name] or 0 for value in found)) for name in names))

    def second(self, key: str) -> float:
        """The second metric of a score that was asked for with it."""
        return self._read(f"second/{key}")["reference"]

    def _keys(self, request: Request) -> list[str]:
        return [request.key, *([f"second/{request.key}"] if request.second else [])]

    @cached_property
    def second_metric(self) -> SecondMetric:
        """By the reference that is searched against."""
        device = str(self.job.final_rollout.rollout.device)
        return SecondMetric(self.job.references["reference"], device)

    def _read(self, key: str) -> dict[str, float]:
        return {k: math.nan if v is None else v for k, v in self.known[key].items()}


class Scorer:
    """Fréchet distances to the named references, e.g. "reference" and "heldout"."""

    def __init__(self, references: Mapping[str, FeatureStats]) -> None:
        self.references: dict[str, FrechetReference] = {}
        for name, stats in references.items():
            with about(name):
                self.references[name] = FrechetReference.from_stats(stats)

    def score(self, features: Tensor) -> dict[str, float]:
        """Distance to each reference; NaN where a feature is not finite."""
        if not bool(features.isfinite().all()):
            return {name: float("nan") for name in self.references}
        stats = feature_stats(features)
        return {name: ref.distance(stats) for name, ref in self.references.items()}

    def floor(self, references: Mapping[str, FeatureStats]) -> float | None:
        """Distance between the reference and the held-out data; None without these."""
        heldout = references.get("heldout")
        return None if heldout is None else self.references["reference"].distance(heldout)


MAX_ROWS: Final = 5000  # of either set: all pairs of rows are compared


class SecondMetric:
    """What no search optimises: KID, or a quadratic kernel's MMD if a reference keeps no features.

    The second needs the reference's moments alone, so that there is always one.
    """

    def __init__(self, reference: Reference, device: str) -> None:
        self._device = "cpu" if device.startswith("mps") else device  # which lacks float64
        source = MetricSource(
            name="kid" if reference.features is not None else "quadratic-mmd",
            reference=reference, device=self._device, max_rows=MAX_ROWS,
        )  # fmt: skip
        self.name = source.name
        self._metric = self._of(source)

    @staticmethod
    def _of(source: MetricSource) -> Callable[[Tensor], float]:
        if source.name == "kid":
            kid = kid_metric(source)
            return lambda features: kid(Sample(features))["kid"]
        moments = source.stats()
        return lambda features: quadratic_distance(features, moments)

    def score(self, features: Tensor) -> float:
        """Unbiased, lower is better, may be negative; NaN where a feature is not finite."""
        try:
            check_features(features, at_least=2)
        except StatisticsError:
            return float("nan")
        return self._metric(features.to(self._device))
