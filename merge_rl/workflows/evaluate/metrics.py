"""Scores of a set of features against a reference, by name.

    fid           Fréchet distance of the moments
    kid           squared MMD with the cubic kernel, unbiased, over all pairs of the rows used
    mmd           the same with a Gaussian kernel as wide as the median distance of real images
    prdc          precision, recall, density, coverage with 5 neighbours
    fid-infinity  FID extrapolated to infinitely many images
    fd-mean       mean over encoders of FD / FD of held-out real images, and the FD of each

KID, MMD and prdc compare pairs of rows, so they take a random part of large sets; the result
states how many. KID, MMD and FID-infinity are estimates without bias and may fall below 0 where
the distributions are close; FID may not.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Protocol

import torch
from torch import Tensor

from merge_rl import registry
from merge_rl.core.distances.frechet import FrechetReference, frechet_infinity
from merge_rl.core.distances.kernels import (
    Kernel,
    RBFKernel,
    cubic_kernel,
    kernel_distance,
    median_bandwidth,
)
from merge_rl.core.distances.neighbours import prdc
from merge_rl.core.distances.statistics import FeatureStats, check_features, feature_stats
from merge_rl.errors import ConfigError, about
from merge_rl.rng import stream
from merge_rl.workflows.assembly import encoder_spans, encoders
from merge_rl.workflows.reference import Reference
from merge_rl.workflows.rewards import columns, real_distances

MAX_ROWS: Final = 10_000
NEIGHBOURS: Final = 5
PAIRWISE: Final = ("kid", "mmd", "prdc")
"""Metrics that compare with the features of real images, row by row."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MetricSource:
    """What a metric is constructed from: its name, the reference, the device."""

    name: str
    reference: Reference
    path: str = "reference"  # of the reference, for messages
    device: str = "cpu"
    max_rows: int = MAX_ROWS  # of either set, where pairs of rows are compared
    seed: int = 0
    real: tuple[Reference, Reference | None] | None = None  # reference, held-out; None: itself

    def stats(self) -> FeatureStats:
        """The reference's moments on the device."""
        stats = self.reference.stats
        return FeatureStats(stats.count, stats.mean.to(self.device), stats.cov.to(self.device))

    def features(self, limit: int) -> Tensor:
        """At most `limit` of the reference's kept features, on the device."""
        kept = self.reference.require_features(self.name, self.path)
        return some_rows(kept, limit, self.seed, "reference").to(self.device)


@dataclass(eq=False)
class Sample:
    """Features (N, D) to be scored; moments are computed once, when a metric asks."""

    features: Tensor

    @cached_property
    def stats(self) -> FeatureStats:
        """Mean and covariance of the features."""
        return feature_stats(self.features)


class Metric(Protocol):
    """Values of a sample, by name."""

    def __call__(self, sample: Sample) -> dict[str, float]:
        """Raise StatisticsError rather than return a score for a failure."""
        ...


class FID:
    """Fréchet distance; lower is better, biased upward by about c/N."""

    def __init__(self, source: MetricSource) -> None:
        self._reference = FrechetReference.from_stats(source.stats())

    def __call__(self, sample: Sample) -> dict[str, float]:
        return {"fid": self._reference.distance(sample.stats)}


class FIDInfinity:
    """FID of infinitely many images, read off a line through FIDs of parts of the sample."""

    def __init__(self, source: MetricSource) -> None:
        self._stats, self._seed = source.stats(), source.seed

    def __call__(self, sample: Sample) -> dict[str, float]:
        generator = stream(self._seed, "fid-infinity")
        found = frechet_infinity(sample.features, self._stats, generator=generator)
        return {"fid-infinity": found.value}


class MeanFD:
    """fd-mean, see `merge_rl.workflows.rewards.mean`; of several encoders, "fd-NAME" of each too.

    Raises StatisticsError where it is not known how far real images are apart.
    """

    def __init__(self, source: MetricSource) -> None:
        stats, name = source.stats(), source.reference.extractor
        spans = encoder_spans(name, stats.dim)
        reference, heldout = source.real or (source.reference, None)
        apart = real_distances(reference, heldout, spans, source.path)
        self._parts = [
            (one, span, distance, FrechetReference.from_stats(columns(stats, span)))
            for one, span, distance in zip(encoders(name), spans, apart, strict=True)
        ]

    def __call__(self, sample: Sample) -> dict[str, float]:
        found, total = {}, 0.0
        for name, span, apart, reference in self._parts:
            distance = reference.distance(columns(sample.stats, span))
            found[f"fd-{name}"] = distance
            total += distance / apart
        mean = {"fd-mean": total / len(self._parts)}
        return {**mean, **found} if len(found) > 1 else mean


class KernelMetric:
    """Unbiased squared MMD over all pairs of the rows used; lower is better, may be negative."""

    def __init__(self, source: MetricSource, kernel: Kernel | None = None) -> None:
        self._source = source
        self._real = source.features(source.max_rows)
        self._kernel = kernel or RBFKernel(median_bandwidth(self._real))

    def __call__(self, sample: Sample) -> dict[str, float]:
        source = self._source
        rows = some_rows(sample.features, source.max_rows, source.seed, "sample")
        return {source.name: kernel_distance(rows, self._real, self._kernel)}


def kid_metric(source: MetricSource) -> KernelMetric:
    """The kernel of KID, (x·y/D + 1)³."""
    return KernelMetric(source, cubic_kernel)


def mmd_metric(source: MetricSource) -> KernelMetric:
    """A Gaussian kernel as wide as the median distance between real images."""
    return KernelMetric(source)


class Neighbourhood:
    """Precision, recall, density, coverage, from equally many rows of both sets."""

    def __init__(self, source: MetricSource) -> None:
        self._source = source
        source.reference.require_features(source.name, source.path)

    def __call__(self, sample: Sample) -> dict[str, float]:
        source = self._source
        real = source.reference.require_features(source.name, source.path)
        count = min(source.max_rows, len(real), len(sample.features))
        fake = some_rows(sample.features, count, source.seed, "sample")
        return prdc(source.features(count), fake, NEIGHBOURS)._asdict()


def some_rows(features: Tensor, limit: int, seed: int, name: str) -> Tensor:
    """At most `limit` rows, drawn by the seed, in order."""
    if len(features) <= limit:
        return features
    order = torch.randperm(len(features), generator=stream(seed, "rows", name))
    return features[order[:limit].sort().values.to(features.device)]


def require_metrics(
    metrics: Sequence[str], references: Mapping[str, tuple[Reference, str]]
) -> None:
    """Raise before any work for no metrics, unknown ones, and features that are not there."""
    if not metrics:
        raise ConfigError("expected at least one metric, got none")
    for name in metrics:
        registry.resolve("metric", registry.METRICS, name)
        for reference, path in references.values():
            if name in PAIRWISE:
                reference.require_features(name, path)


class MetricScores:
    """The metrics for each reference, and what they found in every repeat.

    Args:
        metrics: registered names.
        references: by name, each with the path that messages call it by.
        device, max_rows, seed: as of `MetricSource`.

    Raises UnknownNameError for a metric, StatisticsError for one that needs features which the
    reference does not hold: before any image is made.
    """

    def __init__(
        self,
        metrics: Sequence[str],
        references: Mapping[str, tuple[Reference, str]],
        *,
        device: str = "cpu",
        max_rows: int = MAX_ROWS,
        seed: int = 0,
    ) -> None:
        require_metrics(metrics, references)
        if max_rows < 2:
            raise ConfigError(f"expected at least 2 rows for pairs, got {max_rows}")
        place = "cpu" if device.startswith("mps") else device  # which lacks float64
        self._device, self._max_rows = place, max_rows
        self._pairs = not set(PAIRWISE).isdisjoint(metrics)
        factories = [
            (name, registry.resolve("metric", registry.METRICS, name))
            for name in dict.fromkeys(metrics)
        ]
        real = None
        if "reference" in references:
            other = references.get("heldout")
            real = references["reference"][0], other[0] if other else None
        self._metrics: dict[str, list[Metric]] = {}
        for key, (reference, path) in references.items():
            of_one = functools.partial(
                MetricSource, reference=reference, path=path, device=place, max_rows=max_rows,
                seed=seed, real=real,
            )  # fmt: skip
            with about(path):
                self._metrics[key] = [factory(of_one(name=name)) for name, factory in factories]

    @property
    def rows_used(self) -> int | None:
        """Rows of either set that pairs are taken of, at most; None if no metric compares pairs."""
        return self._max_rows if self._pairs else None

    def of(self, features: Tensor) -> dict[str, dict[str, float]]:
        """{value: {reference: number}} of features (N, D); StatisticsError if one is not finite."""
        check_features(features, at_least=2)  # all rows: some metrics look at a part of them
        sample = Sample(features.to(self._device))
        found: dict[str, dict[str, float]] = {}
        for key, metrics in self._metrics.items():
            for metric in metrics:
                for name, value in metric(sample).items():
                    found.setdefault(name, {})[key] = value
        return found
