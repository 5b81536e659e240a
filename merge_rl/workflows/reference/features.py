"""Features of images in a safetensors file, with what made them; and partial ones to go on from.

The header names the extractor and its weights, so that saved features are compared only with
statistics of the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from merge_rl.errors import RunError, StatisticsError
from merge_rl.storage.files import (
    LABEL_KEYS,
    ArrayInfo,
    WorkFolder,
    npz_arrays,
    npz_labels,
    parse_labels,
    read_array,
    read_file,
    read_npy,
    save_tensors,
    tensor_bytes,
)
from merge_rl.storage.pickles import TensorRef, kind_of, read_data, shown
from merge_rl.untrusted import open_file

FEATURES_FORMAT: Final = "merge_rl.features.v1"
TORCH_SUFFIXES: Final = (".pt", ".pth")
T = TypeVar("T")
Stored: TypeAlias = TensorRef | npt.NDArray[Any]
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
    """Features (N, D) of a `.safetensors`, `.npz`, `.npy`, `.pt` or `.pth` file.

    They are named "features" or "reps"; one matrix of floating numbers alone needs no name but in a
    `.safetensors`. StatisticsError for another shape or type, and where both names lie. Labels that
    are no whole numbers are left aside, rows that are not finite to what computes with them.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix == ".npz":
        return _from_npz(file)
    if suffix == ".npy":
        return SavedFeatures(features=_checked(torch.tensor(read_npy(file)), file))
    if suffix in TORCH_SUFFIXES:
        return _from_torch(file)
    if suffix not in ("", ".safetensors"):
        open_file(file, StatisticsError).close()  # what is none at all is called so
        known = ", ".join((".safetensors", ".npz", ".npy", *TORCH_SUFFIXES))
        raise StatisticsError(f"{file}: expected features as a file of {known}, found {suffix}")
    header, tensors, _ = read_file(file, hashed=False)
    features = _checked(_named(tensors), file, tensors)
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


def torch_features(value: object) -> tuple[Stored | None, Stored | None]:
    """Features and labels in what torch.save wrote: a matrix alone, or several by name."""
    found = value if isinstance(value, dict) else {"features": value}
    named, labels = _named(found), found.get("labels")
    labels = np.array(labels, dtype=object) if isinstance(labels, list) else labels
    if isinstance(named, TensorRef):
        fits = len(named.shape) == 2 and named.info.is_floating
    else:
        fits = isinstance(named, np.ndarray) and named.ndim == 2 and named.dtype.kind == "f"
    return (named if fits else None), (
        labels if isinstance(labels, (TensorRef, np.ndarray)) else None
    )


def _from_torch(file: Path) -> SavedFeatures:
    data = read_data(file)
    found, labels = torch_features(data)
    if found is None:
        raise StatisticsError(
            f"{file}: expected features (N, D) of a floating type, alone or as 'features' or "
            f"'reps', found {told(data)}"
        )
    # In the machine's own type, aligned.
    loaded = (
        torch.tensor(found.astype(np.float64)) if isinstance(found, np.ndarray) else found.load()
    )
    features = _checked(loaded, file, data if isinstance(data, dict) else ())
    given = labels.load() if isinstance(labels, TensorRef) else labels
    return SavedFeatures(features=features, labels=_labels(given, len(features)))


def told(data: object) -> str:
    """What torch.save wrote, in a few words: a tensor as it is, a mapping with its first names."""
    if isinstance(data, dict) and data:
        names = ", ".join(repr(shown(str(key), 40)) for key in itertools.islice(data, 4))
        return f"a mapping of {names}{', ...' if len(data) > 4 else ''}"
    return str(data) if isinstance(data, TensorRef) else kind_of(data)


def _from_npz(file: Path) -> SavedFeatures:
    arrays = npz_arrays(file)
    key = feature_key(arrays)
    found = torch.tensor(read_array(file, key)) if key else None  # aligned memory, unlike numpy's
    features = _checked(found, file, arrays)
    return SavedFeatures(features=features, labels=npz_labels(file, arrays, len(features)).values)


def feature_key(arrays: Mapping[str, ArrayInfo]) -> str | None:
    """The array that holds features: one of their names, or the only one beside labels."""
    named = next((key for key in FEATURE_KEYS if key in arrays), None)
    others = [item for item in arrays.items() if item[0] not in LABEL_KEYS]
    alone = others[0] if len(others) == 1 else None
    matrix = alone and len(alone[1].shape) == 2 and alone[1].dtype.kind == "f"
    return alone[0] if named is None and alone and matrix else named


def _named(tensors: Mapping[Any, T]) -> T | None:
    return next((tensors[key] for key in FEATURE_KEYS if key in tensors), None)


def _checked(found: Tensor | None, file: Path, named: Iterable[str] = ()) -> Tensor:
    names = list(named)
    if set(FEATURE_KEYS).issubset(names):
        raise StatisticsError(
            f"{file}: expected features as {' or '.join(map(repr, FEATURE_KEYS))}, found both"
        )
    if found is None:
        others = ", ".join(map(repr, names[:4])) or "neither"
        raise StatisticsError(f"{file}: expected features as 'features' or 'reps', found {others}")
    if found.ndim != 2 or not found.is_floating_point() or found.shape[1] == 0:
        kind = str(found.dtype).removeprefix("torch.")
        raise StatisticsError(
            f"{file}: expected features (N, D) of a floating type, found {tuple(found.shape)} "
            f"of type {kind}"
        )
    return found.float()


def _labels(found: Tensor | npt.NDArray[Any] | None, count: int) -> Tensor | None:
    if found is None or found.shape != (count,):
        return None
    return parse_labels(found.tolist(), lambda row: f"row {row}").values


class FeatureStore:
    """Blocks of features in a folder, each under a name and a key: all that it depends on.

    A block that is there already is taken as it is; under another key it is refused, as it belongs
    to another evaluation.
    """

    def __init__(
        self, folder: Path, *, extractor: str, sha256: str | None, key: Mapping[str, Any]
    ) -> None:
        self.folder, self._key = folder, dict(key)
        self._blank = SavedFeatures(
            features=torch.empty(0, 1), extractor=extractor, extractor_sha256=sha256
        )

    def file(self, name: str) -> Path:
        """Where a block of this name lies."""
        return self.folder / f"{name}.safetensors"

    def load(self, name: str, key: Mapping[str, Any]) -> Tensor | None:
        """Features (N, D) of a finished block; None if it is not finished."""
        file = self.file(name)
        if not file.exists():
            return None
        saved, expected = load_features(file), self._settings(key)
        for what, value in expected.items():
            found = saved.settings.get(what)
            if found != value:
                raise RunError(
                    f"{file} belongs to another evaluation: its {what} is {found}, expected "
                    f"{value}; choose another folder"
                )
        return saved.features

    def save(
        self, name: str, key: Mapping[str, Any], features: Tensor, labels: Tensor | None = None
    ) -> None:
        """A block is finished; its pieces go."""
        saved = dataclasses.replace(
            self._blank, features=features, labels=labels, settings=self._settings(key)
        )
        save_features(self.file(name), saved)
        self.pieces(name, key).remove()

    def pieces(self, name: str, key: Mapping[str, Any]) -> WorkFolder:
        """The pieces of an unfinished block."""
        return WorkFolder(self.file(name), self._settings(key))

    def _settings(self, key: Mapping[str, Any]) -> dict[str, str]:
        return {
            name: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
            for name, value in {**self._key, **key}.items()
        }


def weights_digest(part: object) -> str:
    """SHA-256 of a network's names, shapes and values; the type's name for what holds none."""
    digest = hashlib.sha256(type(part).__name__.encode())
    if isinstance(part, nn.Module):
        for name, tensor in part.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
