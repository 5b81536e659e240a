"""What of a run or a model folder is published: weights, config, recipe, card, pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from merge_rl.errors import CheckpointError, RunError
from merge_rl.storage.model_file import CONFIG_NAME
from merge_rl.storage.runs import RunDir
from merge_rl.storage.safetensors_header import read_header
from merge_rl.storage.shards import INDEX_NAME, MODEL_NAME, read_index

CARD_NAME: Final = "README.md"
RECIPE_NAME: Final = "merge.yaml"
SHARD_PATTERN: Final = "model-*-of-*.safetensors"
PICTURE_ENDINGS: Final = (".png", ".jpg", ".jpeg", ".webp")
PICTURE_FOLDER: Final = "images"


@dataclass(frozen=True, kw_only=True)
class FolderFile:
    """One file to publish."""

    name: str  # relative to the folder, forward slashes
    size: int


def model_folder(path: str | os.PathLike[str]) -> Path:
    """The model folder that `path` means: itself, or `merged` of a finished run.

    RunError for a run that is not finished, CheckpointError where there is no folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a run or a model folder, found none")
    run = RunDir(folder)
    if not (run.config_path.is_file() and (folder / "inputs.json").is_file()):
        return folder
    if run.read("result.json") is None:
        raise RunError(f"{folder}: the run is not finished; go on with: mergerl resume {folder}")
    if not run.merged_path.is_dir():
        raise RunError(f"{folder}: the run has no merged model, expected the folder merged/")
    return run.merged_path


def list_model(folder: Path) -> list[FolderFile]:
    """The files of a model folder that are published, checked; weights first.

    Needs weights (model.safetensors, or shards and their index) and README.md. Everything else in
    the folder is left out; a link that leads out of it is refused, since what it leads to would be
    published.
    """
    names = [*_weights(folder), *_companions(folder)]
    return [FolderFile(name=name, size=_size(folder, name)) for name in names]


def _weights(folder: Path) -> list[str]:
    homes, single = read_index(folder), (folder / MODEL_NAME).is_file()
    if homes is None and not single:
        raise CheckpointError(f"{folder}: expected {MODEL_NAME}, or shards with {INDEX_NAME}")
    if homes is not None and single:
        raise CheckpointError(f"{folder}: found both {MODEL_NAME} and {INDEX_NAME}, expected one")
    shards = sorted({path.name for path in homes.values()}) if homes else []
    for name in shards:
        if not fnmatchcase(name, SHARD_PATTERN):
            raise CheckpointError(
                f"{folder}: expected shards named {SHARD_PATTERN}, found {name!r}"
            )
    for name in shards or [MODEL_NAME]:
        read_header(folder / name)  # refuses a missing or truncated file
    return [*shards, INDEX_NAME] if shards else [MODEL_NAME]


def _companions(folder: Path) -> Iterator[str]:
    if not (folder / CARD_NAME).is_file():
        raise CheckpointError(f"{folder}: expected a model card, {CARD_NAME}")
    yield from (n for n in (CONFIG_NAME, RECIPE_NAME, CARD_NAME) if (folder / n).is_file())
    for place in (folder, folder / PICTURE_FOLDER):
        found = sorted(place.iterdir()) if place.is_dir() else []
        for file in found:
            is_picture = file.suffix.lower() in PICTURE_ENDINGS and file.name[0] != "."
            if is_picture and file.is_file():
                yield file.relative_to(folder).as_posix()


def _size(folder: Path, name: str) -> int:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{path}: a link that leaves the folder is not published")
    return path.stat().st_size
