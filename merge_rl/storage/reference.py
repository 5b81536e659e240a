"""Reference statistics: the moments of real images' features, in safetensors.

The header says which extractor made the features, with which weights, from how many images of
which resolution: statistics of another extractor are refused, not compared.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from merge_rl.core.statistics import FeatureStats
from merge_rl.errors import StatisticsError
from merge_rl.storage.atomic import save_tensors
from merge_rl.storage.model_file import open_model_file

FORMAT = "merge_rl.reference.v1"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Moments of real images and what they were made with."""

    stats: FeatureStats
    extractor: str
    extractor_sha256: str | None
    resolution: int | None
    source: str

    def require_extractor(self, name: str, sha256: str | None, path: Path) -> None:
        """Raise StatisticsError unless features of this extractor may be compared with these."""
        if self.extractor != name:
            raise StatisticsError(
                f"{path}: statistics of extractor {self.extractor!r}, expected {name!r}"
            )
        if sha256 and self.extractor_sha256 and sha256 != self.extractor_sha256:
            raise StatisticsError(
                f"{path}: made with {name} weights {self.extractor_sha256[:12]}…, "
                f"expected {sha256[:12]}…"
            )


def save_reference(
    path: str | os.PathLike[str],
    stats: FeatureStats,
    *,
    extractor: str,
    extractor_sha256: str | None = None,
    resolution: int | None = None,
    source: str = "",
) -> None:
    """Write moments as float64 "mu" (D,) and "sigma" (D, D), atomically."""
    metadata = {
        "format": FORMAT,
        "count": str(stats.count),
        "extractor": extractor,
        "extractor_sha256": extractor_sha256 or "",
        "resolution": str(resolution or ""),
        "source": source,
    }
    save_tensors(path, {"mu": stats.mean, "sigma": stats.cov}, metadata)


def load_reference(path: str | os.PathLike[str]) -> Reference:
    """Read what `save_reference` wrote; StatisticsError for any other content."""
    file = open_model_file(path)
    metadata = file.metadata
    if metadata.get("format") != FORMAT or set(file.weights) != {"mu", "sigma"}:
        raise StatisticsError(f"{path}: expected reference statistics, found other tensors")
    mean, cov = file.weights["mu"].double(), file.weights["sigma"].double()
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        shapes = f"{tuple(mean.shape)} and {tuple(cov.shape)}"
        raise StatisticsError(f"{path}: expected a mean (D,) and a covariance (D, D), got {shapes}")
    return Reference(
        stats=FeatureStats(_count(metadata, path), mean, cov),
        extractor=metadata.get("extractor", ""),
        extractor_sha256=metadata.get("extractor_sha256") or None,
        resolution=int(metadata["resolution"])
        if metadata.get("resolution", "").isdecimal()
        else None,
        source=metadata.get("source", ""),
    )


def _count(metadata: Mapping[str, str], path: str | os.PathLike[str]) -> int:
    count = metadata.get("count", "")
    if not count.isdecimal():
        raise StatisticsError(f"{path}: expected the number of images, found count {count!r}")
    return int(count)
