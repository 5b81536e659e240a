"""Which files a conversion reads of the paths that it is given."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from merge_rl.errors import CheckpointError, ConfigError, absent
from merge_rl.storage.checkpoints import has_manifest
from merge_rl.storage.convert.layouts import files_in, folders_in, is_pipeline, own_files
from merge_rl.storage.files import index_of
from merge_rl.untrusted import open_file

_DEPTH: Final = 4  # of folders below: Lightning's logs/version_0/checkpoints
_MOST_FOLDERS: Final = 1000


def list_files(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> tuple[list[Path], list[str]]:
    """The files that are meant: themselves, or those of a folder; each once.

    A folder that holds one checkpoint stands for itself (`place_of`), a shard for the model of its
    index. Beside them sentences: of each other name of a file among them, a link to it, and of what
    a folder holds beside what was taken.
    """
    notes: list[str] = []
    given = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    names: dict[Path, list[Path]] = {}
    for item in map(Path, given):
        if item.is_dir():
            within, told = _meant(item)
            notes += told
        elif not item.exists():
            raise CheckpointError(absent(item, of_hub=True))
        else:
            open_file(item).close()  # refuses what is neither a file nor a folder
            within = [index_of(item) or item]
        for file in within:
            names.setdefault(file.resolve(), []).append(file)
    if not names:
        raise ConfigError("expected at least one file or folder to convert, got none")
    # A link is another name for its file: the file's own counts.
    files = [min(alike, key=Path.is_symlink) for alike in names.values()]
    repeated = [
        f"{other} and {kept} are the same file and count once, as {kept.name}"
        for kept, alike in zip(files, names.values(), strict=True)
        for other in dict.fromkeys(alike)
        if other != kept
    ]
    return files, [*notes, *repeated]


def _meant(folder: Path) -> tuple[list[Path], list[str]]:
    """What of a folder is converted, or of the one folder below with checkpoints; a word on it."""
    within = files_in(folder)
    if within:
        if all(file.parent == folder and file.is_file() for file in within):
            others = ", ".join(_relative(_below(folder), folder))
            left_those = f"{folder}: took the files in it; left those in {others}"
            return within, [left_those] if others else []
        saved = within[0].is_dir() and folder not in within
        pipelines = filter(is_pipeline, folders_in(folder))
        left = [file.name for file in (*own_files(folder), *pipelines)] if saved else []
        listed = ", ".join(left[:3]) + f" and {len(left) - 3} more" * (len(left) > 3)
        left_own = f"{folder}: took the checkpoints in folders of their own; left {listed}"
        return within, [left_own] if left else []
    if has_manifest(folder):
        raise CheckpointError(f"{folder}: a set of .safetensors already, nothing to convert")
    below = _below(folder)
    if not below:
        raise CheckpointError(
            f"{folder}: holds no checkpoints to convert (.pkl, .pt, .pth, .ckpt, folders)"
        )
    if len(below) > 1:
        listed = ", ".join(_relative(below, folder))
        raise CheckpointError(
            f"{folder}: holds no checkpoints itself; some lie in {listed}: name the folder that is "
            "meant"
        )
    within, told = _meant(below[0])
    return within, [f"{folder}: took the checkpoints in {below[0].relative_to(folder)}", *told]


def _relative(folders: Sequence[Path], folder: Path) -> list[str]:
    shown = [str(item.relative_to(folder)) for item in folders[:4]]
    return [*shown, *[f"{len(folders) - 4} more folders"] * (len(folders) > 4)]


def _below(folder: Path) -> list[Path]:
    """The next folders below that hold something to convert, all of one depth."""
    level = [folder]
    for _ in range(_DEPTH):
        level = [inner for item in level for inner in folders_in(item)][:_MOST_FOLDERS]
        found = [item for item in level if _holds_some(item)]
        if found:
            return found
    return []


def _holds_some(folder: Path) -> bool:
    try:
        return bool(files_in(folder))
    except (CheckpointError, OSError):  # is no network's, or not ours to read
        return False
