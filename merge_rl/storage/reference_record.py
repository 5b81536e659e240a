"""Reference statistics in memory: moments of real images' features, and what they were made with.

Statistics of another extractor or dimension are refused, not compared.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from merge_rl.core.statistics import FeatureStats, check_moments
from merge_rl.errors import StatisticsError

UNKNOWN_COUNT: Final = 2
"""Stands in `Reference.stats` for a number of images that a file does not record: the least that
has a covariance. No distance depends on the reference's own number."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """Moments of real images' features, and what they were made with."""

    stats: FeatureStats
    extractor: str = ""  # "" where nothing tells it
    family: bool = False  # whether `extractor` stands for all of its preprocessings, "NAME-..."
    extractor_sha256: str | None = None
    preprocessing: str = ""
    resolution: int | None = None
    source: str = ""
    count_known: bool = True
    assumed: str = ""  # what the file does not say, for the user to read
    features: Tensor | None = None  # (M, D) float32 of M <= count of the images
    labels: Tensor | None = None  # (M,) int64, the classes of those

    @property
    def count(self) -> int | None:
        """Images behind the moments; None where the file does not say."""
        return self.stats.count if self.count_known else None

    @property
    def dim(self) -> int:
        return self.stats.dim

    def require_extractor(
        self,
        name: str,
        sha256: str | None,
        path: str | os.PathLike[str] = "reference",
        dim: int | None = None,
    ) -> None:
        """Raise StatisticsError unless features of this extractor may be compared with these.

        Where the file names no extractor, one of the family that it was assumed to be of will do,
        or, where nothing could be assumed, any of the same dimension.
        """
        known = self.extractor
        if known and name != known and not (self.family and name.startswith(f"{known}-")):
            raise StatisticsError(f"{path}: statistics of extractor {known!r}, expected {name!r}")
        if sha256 and self.extractor_sha256 and sha256 != self.extractor_sha256:
            raise StatisticsError(
                f"{path}: made with {name} weights {self.extractor_sha256[:12]}…, "
                f"expected {sha256[:12]}…"
            )
        if dim is not None and dim != self.dim:
            raise StatisticsError(
                f"{path}: statistics of {self.dim} dimensions, expected the {dim} of "
                f"extractor {name!r}"
            )

    def require_features(self, metric: str, path: str | os.PathLike[str] = "reference") -> Tensor:
        """The kept features (M, D); StatisticsError, saying how to keep them, if there are none."""
        if self.features is None:
            raise StatisticsError(
                f"{path}: {metric} compares with the features of real images, but these "
                "statistics hold moments alone; make them with `mergerl reference --keep-features`"
            )
        return self.features


def sound_moments(count: int, mean: Tensor, cov: Tensor, where: str) -> FeatureStats:
    """Moments in float64, as given but for the type.

    StatisticsError, beginning with `where`, for NaN, a covariance that is not square, not symmetric
    or has a negative variance, a mean of another dimension, and fewer than two samples.
    """
    try:
        if mean.is_complex() or cov.is_complex():
            raise StatisticsError("expected real moments, got complex ones")
        stats = FeatureStats(count, mean.double(), cov.double())
        check_moments(stats)
    except StatisticsError as error:
        raise type(error)(f"{where}: {error}") from None
    return stats
