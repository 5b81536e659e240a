"""What lies at a path: told from names and headers, before anything is loaded."""

from __future__ import annotations

import os
from typing import Final, Literal

from merge_rl.storage.features_file import FEATURE_KEYS
from merge_rl.storage.image_arrays import IMAGE_KEYS
from merge_rl.storage.model_file import CONFIG_NAME
from merge_rl.storage.npz import npz_arrays
from merge_rl.storage.reference import reference_file
from merge_rl.storage.safetensors_header import read_header

Kind = Literal["model", "images", "features", "reference"]
_MOMENTS: Final = {"mu", "sigma"}


def kind_of(path: str | os.PathLike[str]) -> Kind:
    """The most likely kind of a path; whoever reads it checks and says what is wrong.

    A folder is a model if it holds weights or a config, else images.
    """
    file, entry = reference_file(path)
    if file.is_dir():
        weights = any(item.suffix == ".safetensors" for item in file.iterdir())
        return "model" if weights or (file / CONFIG_NAME).is_file() else "images"
    if entry is not None:
        return "reference"
    suffix = file.suffix.lower()
    if suffix == ".npz":
        return _of_names(set(npz_arrays(file))) or "reference"
    if suffix == ".safetensors" and file.is_file():
        return _of_names(set(read_header(file).tensors)) or "model"
    return "images" if suffix == ".zip" else "model"


def _of_names(names: set[str]) -> Kind | None:
    # ADM's statistics come with images, and ours may come with features.
    if names >= _MOMENTS:
        return "reference"
    if names & set(FEATURE_KEYS):
        return "features"
    return "images" if names & set(IMAGE_KEYS) else None
