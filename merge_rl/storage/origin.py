"""Where a network comes from: its set's name, its licence, how far it was trained."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_rl.errors import CheckpointError
from merge_rl.storage.manifest import CheckpointEntry, Manifest, has_manifest, read_manifest
from merge_rl.storage.model_file import find_listing, model_file_path, open_model_file
from merge_rl.storage.selection import list_folder, select_entries


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What is known of a model."""

    name: str
    config: Mapping[str, Any]  # "model" and the network's constructor options
    licence: str | None = None
    source: str | None = None  # where the manifest says that it came from
    nimg: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)  # of the file


def find_origin(path: str | os.PathLike[str]) -> Origin:
    """What files and manifests say of the model at `path`."""
    file = open_model_file(path)
    if file.config is None:
        raise CheckpointError(f"{path}: the model config is not known; expected a config.json")
    manifest, entry = _listing(Path(path)) or (_nearest(Path(path)), None)
    return Origin(
        name=(manifest.name if manifest else None) or Path(path).resolve().stem,
        config=file.config,
        licence=(entry.licence if entry else None) or (manifest.licence if manifest else None),
        source=entry.source if entry else None,
        nimg=entry.nimg if entry else None,
        metadata=file.metadata,
    )


def newest_model(path: str | os.PathLike[str], track: str | None = None) -> Path:
    """`path` itself, or the newest checkpoint of the set that it is the folder of.

    "Newest" is the largest (nimg, ema_std), the last one of those equal.
    """
    folder = Path(path)
    if not (folder.is_dir() and has_manifest(folder)):
        if track is not None:
            raise CheckpointError(f"{path}: a track is a series of a set; expected its folder")
        return folder
    chosen = select_entries(list_folder(folder), track=track, select=None)
    return folder / chosen.entries[-1].file


def _nearest(path: Path) -> Manifest | None:
    """The manifest of the set or run that a model lies in without being one of its files."""
    for folder in list(path.resolve().parents)[:2]:
        if has_manifest(folder):
            return read_manifest(folder)
    return None


def _listing(path: Path) -> tuple[Manifest, CheckpointEntry] | None:
    try:
        return find_listing(model_file_path(path))
    except CheckpointError:  # shards, which no manifest lists
        return None
