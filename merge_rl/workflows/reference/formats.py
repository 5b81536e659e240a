"""Reference statistics as other projects write them.

    EDM2 .pkl                 {"num_images", "fid": {"mu", "sigma"}, "fd_dinov2": {...}}
    pytorch-fid, clean-fid    .npz with mu, sigma
    torch-fidelity            .pt with mu, sigma
    ADM                       .npz with mu, sigma, and mu_s, sigma_s, arr_0
    dgm-eval                  .npz with reps: features

None of them names its extractor or the extractor's weights; what is known all the same, or has to
be assumed, is said in the `Reference`.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from merge_rl.config import whole_number
from merge_rl.core.distances.statistics import FeatureStats, check_moments, feature_stats
from merge_rl.errors import StatisticsError, about
from merge_rl.storage.files import LABEL_KEYS, image_key, npz_arrays, read_array
from merge_rl.storage.pickles import TensorRef, kind_of, read_pickle, shown
from merge_rl.workflows.reference.features import (
    FEATURE_KEYS,
    SavedFeatures,
    feature_key,
    load_features,
)

MAX_DIM: Final = 16_384
MOMENTS: Final = frozenset({"mu", "sigma"})
# EDM2's entries, and the extractors that its published code computes them with.
EDM2_ENTRIES: Final[Mapping[str, str]] = {"fid": "inception-tf1", "fd_dinov2": "dinov2"}
INCEPTION_DIM: Final = 2048


def read_edm2(
    path: Path, *, entry: str | None, extractor: str | None, dim: int | None
) -> Reference:
    """One entry of an EDM2 reference pickle, read as data alone.

    Which one: `entry` by name, else that of the extractor, else the only one, or the only one of
    that dimension.
    """
    count, entries = edm2_entries(path)
    name = _choose(path, entries, entry, extractor, dim)
    if not name:
        return from_moments(path, entries[name], entries[name], None)
    where = f"{path}, {name!r}"
    mean, cov = (_tensor(entries[name][key], key, where) for key in ("mu", "sigma"))
    known = EDM2_ENTRIES.get(name, "")
    return Reference(
        stats=_symmetric_moments(count, mean, cov, where),
        extractor=known,
        source=f"{path.name}#{name}",
        assumed=f"weights of {known or 'the extractor'} not recorded in the file",
    )


def edm2_entries(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Number of images, and {"fid": {"mu", "sigma"}, ...} of an EDM2 reference pickle.

    Moments that lie in a pickle by themselves are the entry "", of an unknown number.
    """
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise StatisticsError(f"{path}: expected a mapping of statistics, found other data")
    if content.keys() >= MOMENTS:
        return UNKNOWN_COUNT, {"": content}
    entries = {
        str(name): value
        for name, value in content.items()
        if isinstance(value, dict) and value.keys() >= MOMENTS
    }
    if not entries:
        raise StatisticsError(f"{path}: expected entries with 'mu' and 'sigma', found none")
    said = content.get("num_images")
    count = whole_number(said)
    if count is None:
        raise StatisticsError(f"{path}: expected num_images as a whole number, found {said!r:.60}")
    return count, entries


def _choose(
    path: Path,
    entries: Mapping[str, Mapping[str, Any]],
    entry: str | None,
    extractor: str | None,
    dim: int | None,
) -> str:
    listed = " and ".join(map(repr, entries))
    if entry is not None:
        if entry not in entries:
            raise StatisticsError(f"{path}: has no entry {entry!r}, it holds {listed}")
        return entry
    named = [name for name in entries if extractor and EDM2_ENTRIES.get(name) == extractor]
    fitting = [name for name in entries if getattr(entries[name]["mu"], "shape", ()) == (dim,)]
    for candidates in (named, list(entries), fitting):
        if len(candidates) == 1:
            return candidates[0]
    raise StatisticsError(
        f"{path}: holds {listed}; choose one as {path.name}#{next(iter(entries))}"
    )


def read_npz(path: Path) -> Reference:
    """Statistics or features of a .npz file; its keys tell which."""
    arrays = npz_arrays(path)
    if arrays.keys() >= MOMENTS:
        if (dim := math.prod(arrays["mu"].shape)) > MAX_DIM:
            raise StatisticsError(f"{path}: of {dim} dimensions, at most {MAX_DIM} are read")
        saved = load_features(path) if feature_key(arrays) else None
        return from_moments(path, {key: read_array(path, key) for key in MOMENTS}, arrays, saved)
    if feature_key(arrays):
        return from_features(load_features(path), path)
    made = "; `mergerl reference` makes statistics of images" if image_key(arrays) else ""
    found = ", ".join(f"{name!r} {info}" for name, info in itertools.islice(arrays.items(), 4))
    raise StatisticsError(f"{path}: expected 'mu' and 'sigma', or 'reps', found {found}{made}")


def from_moments(
    path: Path,
    found: Mapping[str, object],
    names: Iterable[str],
    saved: SavedFeatures | None = None,
) -> Reference:
    """Moments that lie by themselves under "mu" and "sigma", of a number of images not recorded.

    `names` are all that lie there, and `saved` features beside the moments, which are kept;
    StatisticsError for those of another dimension.
    """
    mean, cov = (_tensor(found[key], key, str(path)) for key in ("mu", "sigma"))
    stats = _symmetric_moments(UNKNOWN_COUNT, mean, cov, str(path))
    if saved and saved.features.shape[1] != stats.dim:
        raise StatisticsError(
            f"{path}: expected features (M, {stats.dim}), got {tuple(saved.features.shape)}"
        )
    used = MOMENTS.union((*FEATURE_KEYS, *LABEL_KEYS) if saved else ())
    unused = [shown(str(name)) for name in names if name not in used]
    notes = ["the number of images is not recorded", _family_note(stats.dim)]
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        notes.append(f"{', '.join(unused[:3])}{more} left aside")
    return Reference(
        stats=stats,
        count_known=False,
        extractor="inception" if stats.dim == INCEPTION_DIM else "",
        family=True,
        source=path.name,
        assumed="; ".join(notes),
        features=saved.features if saved else None,
        labels=saved.labels if saved else None,
    )


def from_features(saved: SavedFeatures, path: Path) -> Reference:
    """Moments of saved features, which are kept too."""
    with about(path):
        stats = feature_stats(saved.features)
    family = "inception" if stats.dim == INCEPTION_DIM else ""
    return Reference(
        stats=stats,
        extractor=saved.extractor or family,
        extractor_sha256=saved.extractor_sha256,
        family=not saved.extractor,
        source=path.name,
        assumed="" if saved.extractor else _family_note(stats.dim),
        features=saved.features,
        labels=saved.labels,
    )


def _symmetric_moments(count: int, mean: Tensor, cov: Tensor, where: str) -> FeatureStats:
    """Checked moments; single precision, in which some files are, leaves them a little askew."""
    stats = sound_moments(count, mean, cov, where)
    return FeatureStats(count, stats.mean, (stats.cov + stats.cov.T) / 2)


def _family_note(dim: int) -> str:
    if dim == INCEPTION_DIM:
        return "assumed to be of Inception, whichever resize it was used with: the file is silent"
    return f"its extractor is not recorded, it is compared with any that has {dim} features"


def _tensor(value: object, key: str, where: str) -> Tensor:
    if isinstance(value, TensorRef):
        value = value.load()
    if isinstance(value, Tensor):  # whose type is looked at with the moments
        return value
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        kind = f"type {value.dtype}" if isinstance(value, np.ndarray) else kind_of(value)
        raise StatisticsError(
            f"{where}: expected {key!r} as an array of a floating type, found {kind}"
        )
    return torch.tensor(value.astype(np.float64))  # aligned, as numpy's own memory is not


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
            whose = f"extractor {name!r}" if name else "the features"
            raise StatisticsError(
                f"{path}: statistics of {self.dim} dimensions, expected the {dim} of {whose}"
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

    StatisticsError, beginning with `where`, for NaN, whole or complex numbers, a covariance that is
    not square, not symmetric or has a negative variance, a mean of another dimension, and fewer
    than two samples.
    """
    with about(where):
        if odd := [t.dtype for t in (mean, cov) if not t.is_floating_point()]:
            found = str(odd[0]).removeprefix("torch.")
            raise StatisticsError(f"expected moments of a floating type, got {found}")
        stats = FeatureStats(count, mean.double(), cov.double())
        check_moments(stats)
    return stats


def few_images(count: int, dim: int) -> list[str]:
    """A sentence where N images of D features have a singular covariance: N <= D."""
    if count > dim:
        return []
    return [
        f"{count} images for {dim} features: the covariance is singular, and a Fréchet distance "
        "says little"
    ]
