"""Entries of files in the manifests of the folders above them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from merge_rl.errors import MergeRLError
from merge_rl.storage.checkpoints.manifest import (
    CheckpointEntry,
    Manifest,
    has_manifest,
    read_manifest,
)
from merge_rl.storage.files import spellings
from merge_rl.untrusted import load_yaml

RECIPE_NAME: Final = "merge.yaml"  # of a merge, beside its weights
_PARENTS: Final = 3  # the folder of a file and two above, where its manifest may lie

_FACTS: Final = ("nimg", "ema_std", "ema_gamma", "ema_start", "track", "licence")
Recorded = tuple[Manifest, CheckpointEntry]


def find_listing(file: Path) -> Recorded | None:
    """The nearest manifest that lists `file`, and its entry."""
    return find_listings([file]).get(file)


def find_listings(files: Iterable[Path]) -> dict[Path, Recorded]:
    """The same of several files, as far as they are listed; every manifest is read once."""
    known: dict[Path, dict[str, Recorded]] = {}
    found: dict[Path, Recorded] = {}
    for file in files:
        places = [(place, above) for place in spellings(file) for above in place.parents[:_PARENTS]]
        for place, folder in places:
            if folder not in known:
                known[folder] = _entries_of(folder)
            entry = known[folder].get(place.relative_to(folder).as_posix())
            if entry is not None:
                found[file] = entry
                break
    return found


def with_records(folder: Path, entries: Sequence[CheckpointEntry]) -> tuple[CheckpointEntry, ...]:
    """The entries of a folder within a set, each as the set's manifest has it, with its licence.

    A merge, which no manifest lists, has the licence that its recipe states.
    """
    files = [folder / entry.file for entry in entries]
    listed = find_listings(files)
    places = {file.parent for file in files if file not in listed}
    made = {place: licence_beside(place) for place in places}
    return tuple(
        _recorded(entry, listed[file])
        if file in listed
        else replace(entry, licence=made[file.parent])
        for entry, file in zip(entries, files, strict=True)
    )


def licence_beside(path: Path) -> str | None:
    """The licence that the recipe of a merge states, in the folder of a file or a folder itself."""
    file = (path if path.is_dir() else path.parent) / RECIPE_NAME
    try:
        document = load_yaml(file) if file.is_file() else None
    except MergeRLError:  # not a recipe of ours, or damaged: whoever needs it says so
        return None
    licence = document.get("licence") if isinstance(document, dict) else None
    return licence if isinstance(licence, str) else None


def recorded_facts(listed: Recorded | None) -> dict[str, Any]:
    """What a manifest says of a file's training and licence, by the names of an entry's fields."""
    if listed is None:
        return {}
    entry = _recorded(listed[1], listed)
    facts = {key: getattr(entry, key) for key in _FACTS}
    return {key: value for key, value in facts.items() if value is not None}


def _recorded(entry: CheckpointEntry, listed: Recorded) -> CheckpointEntry:
    manifest, known = listed
    return replace(known, file=entry.file, licence=known.licence or manifest.licence)


def _entries_of(folder: Path) -> dict[str, Recorded]:
    if not has_manifest(folder):
        return {}
    manifest = read_manifest(folder)
    return {entry.file: (manifest, entry) for entry in manifest.checkpoints}
