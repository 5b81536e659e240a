"""What a fetch will take: the files, how large they are, which of them are here already."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from merge_rl.storage.download import part_path
from merge_rl.storage.fetch_record import FetchRecord
from merge_rl.storage.fetch_sources import Source, find_source, needs_conversion, with_sizes
from merge_rl.storage.manifest import relative_inside
from merge_rl.storage.snapshots import RemoteFile, Selection, select_files

ORIGINALS: Final = "originals"


@dataclass(frozen=True, kw_only=True)
class FetchPlan:
    """What would be fetched, and what that takes."""

    source: Source
    folder: Path
    files: tuple[RemoteFile, ...]  # the selection, companions included, with sizes
    done: frozenset[str]  # names of those that are here already
    begun: int = 0  # bytes that interrupted downloads have left
    delete_original: bool = False

    @property
    def size(self) -> int:
        """Bytes of all selected files, as published."""
        return sum(file.size or 0 for file in self.files)

    @property
    def to_download(self) -> int:
        """Bytes that will go over the network, without what an earlier call has left."""
        return max(0, sum(file.size or 0 for file in self.todo) - self.begun)

    @property
    def todo(self) -> tuple[RemoteFile, ...]:
        return tuple(file for file in self.files if file.name not in self.done)

    @property
    def disk_needed(self) -> int:
        """Free bytes it takes; what is converted is about as large as its original."""
        pickles = [file.size or 0 for file in self.todo if needs_conversion(file)]
        kept = self.to_download
        if not self.delete_original:
            return kept + sum(pickles)
        return kept + max(pickles, default=0)

    @property
    def disk_free(self) -> int:
        """Free bytes where the folder is or will be."""
        place = self.folder.absolute()
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free


def plan_fetch(
    name: str,
    folder: str | os.PathLike[str],
    *,
    selection: Selection | None = None,
    revision: str | None = None,
    sha256: str | None = None,
    delete_original: bool = False,
) -> FetchPlan:
    """Find out what a fetch will take; writes nothing.

    Args:
        name: a set of the catalogue, "user/repo" or "user/repo@revision" of the Hub, or the https
            address of one file.
        folder: new, empty, or fetched into before from the same source.
        selection: which files; all by default.
        revision: branch, tag or commit of a repository.
        sha256: of an address.
        delete_original: remove each pickle after its conversion.

    Raises ConfigError, DownloadError, HubError. Files that are here are read, and fetched again
    where they have changed, here or there.
    """
    source = find_source(name, revision=revision, sha256=sha256)
    record = FetchRecord.open(Path(folder), source.name)
    chosen = select_files(source.files, selection or Selection(), source.name)
    files = with_sizes((*chosen, *source.companions))
    for file in files:
        relative_inside(Path(folder), file.name, source.name)
    done = frozenset(file.name for file in files if record.is_done(file))
    parts = [target_path(Path(folder), file) for file in files if file.name not in done]
    parts = [part_path(path) for path in parts]
    return FetchPlan(
        source=source,
        folder=Path(folder),
        files=files,
        done=done,
        begun=sum(path.stat().st_size for path in parts if path.is_file()),
        delete_original=delete_original,
    )


def target_path(folder: Path, file: RemoteFile) -> Path:
    """Where a file is downloaded to; what will be converted lies apart."""
    return folder / ORIGINALS / file.name if needs_conversion(file) else folder / file.name
