"""Features of images in a safetensors file, with what made them; and partial ones to go on from.

The header names the extractor and its weights, so that saved features are compared only with
statistics of the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from merge_rl.errors import StatisticsError
from merge_rl.storage.atomic import save_tensors
from merge_rl.storage.npz import npz_arrays, read_array
from merge_rl.storage.safetensors_file import read_file
from merge_rl.storage.safetensors_header import read_header

FEATURES_FORMAT: Final = "merge_rl.features.v1"
FEATURE_KEYS: Final = ("features", "reps")  # reps: what dgm-eval writes


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedFeatures:
    """Features (N, D) float32 of one set of images; "" and None for what a file does not say."""

    features: Tensor
    labels: Tensor | None = None
    extractor: str = ""
    extractor_sha256: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)  # whatever else they depend on


def save_features(path: str | os.PathLike[str], saved: SavedFeatures) -> None:
    """Write features atomically; equal features give equal bytes."""
    tensors = {"features": saved.features.float()}
    if saved.labels is not None:
        tensors["labels"] = saved.labels
    metadata = {
        **saved.settings,
        "format": FEATURES_FORMAT,
        "extractor": saved.extractor,
        "extractor_sha256": saved.extractor_sha256 or "",
    }
    save_tensors(path, tensors, metadata)


def load_features(path: str | os.PathLike[str]) -> SavedFeatures:
    """Features of a `.safetensors` or `.npz` with "features" or "reps" (N, D).

    StatisticsError for another shape or type. Rows that are not finite are left to what computes
    with them.
    """
    file = Path(path)
    if file.suffix.lower() == ".npz":
        return _from_npz(file)
    header, tensors, _ = read_file(file, hashed=False)
    features = _checked(next((tensors[k] for k in FEATURE_KEYS if k in tensors), None), file)
    settings = dict(header.metadata)
    settings.pop("format", None)
    extractor, digest = settings.pop("extractor", ""), settings.pop("extractor_sha256", "")
    return SavedFeatures(
        features=features,
        labels=_labels(tensors.get("labels"), len(features)),
        extractor=extractor,
        extractor_sha256=digest or None,
        settings=settings,
    )


def has_features(path: Path) -> bool:
    """Whether a file holds features; only its header is read."""
    if path.suffix.lower() == ".npz":
        return bool(set(FEATURE_KEYS) & set(npz_arrays(path)))
    return path.suffix == ".safetensors" and bool(
        set(FEATURE_KEYS) & set(read_header(path).tensors)
    )


def _from_npz(file: Path) -> SavedFeatures:
    arrays = npz_arrays(file)
    key = next((key for key in FEATURE_KEYS if key in arrays), None)
    found = torch.tensor(read_array(file, key)) if key else None  # aligned memory, unlike numpy's
    features = _checked(found, file)
    labels = torch.from_numpy(read_array(file, "labels")) if "labels" in arrays else None
    return SavedFeatures(features=features, labels=_labels(labels, len(features)))


def _checked(found: Tensor | None, file: Path) -> Tensor:
    if found is None:
        raise StatisticsError(f"{file}: expected features as 'features' or 'reps', found neither")
    if found.ndim != 2 or not found.is_floating_point() or found.shape[1] == 0:
        kind = str(found.dtype).removeprefix("torch.")
        raise StatisticsError(
            f"{file}: expected features (N, D) of a floating type, found {tuple(found.shape)} "
            f"of type {kind}"
        )
    return found.float()


def _labels(found: Tensor | None, count: int) -> Tensor | None:
    if found is None or found.shape != (count,) or found.is_floating_point():
        return None
    return found.long()
