"""What a fetch will take: the files, how large they are, which of them are here already."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from merge_rl.errors import CheckpointError, ConfigError
from merge_rl.storage.checkpoints import relative_inside
from merge_rl.storage.files import is_vacant, sha256_file, write_json
from merge_rl.storage.hub.download import part_path
from merge_rl.storage.hub.fetch_sources import (
    RemoteFile,
    Selection,
    Source,
    find_source,
    needs_conversion,
    select_files,
    with_sizes,
)
from merge_rl.untrusted import load_json_mapping, read_bounded

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
        """The files that are not here yet."""
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


RECORD_NAME: Final = "fetch.json"
RECORD_VERSION: Final = 1


@dataclass(frozen=True, kw_only=True)
class FetchedFile:
    """One finished file: what it was, and what was made of it."""

    size: int
    version: str | None
    sha256: str  # of the file as published
    outputs: dict[str, str]  # relative path -> SHA-256; the file itself where nothing was converted


@dataclass
class FetchRecord:
    """The record of one folder; written after every file."""

    folder: Path
    source: str
    files: dict[str, FetchedFile] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, source: str) -> FetchRecord:
        """The record of a folder, a new one if the folder is empty or missing.

        ConfigError for a folder that holds something else, or files of another source.
        """
        path = folder / RECORD_NAME
        if not path.is_file():
            if not is_vacant(folder) and (not folder.is_dir() or any(folder.iterdir())):
                raise ConfigError(
                    f"{folder}: expected a new or an empty folder, or one fetched into"
                )
            return cls(folder, source)
        document = load_json_mapping(read_bounded(path), str(path))
        if document.get("source") != source:
            raise ConfigError(
                f"{folder}: holds files of {document.get('source')!r}, expected those of "
                f"{source!r}; choose another folder"
            )
        try:
            files = {name: _parse(folder, item) for name, item in document["files"].items()}
        except (KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{path}: damaged; delete it, then fetch again") from None
        return cls(folder, source, files)

    def add(self, name: str, fetched: FetchedFile) -> None:
        """Record a finished file, on disk as well."""
        self.files[name] = fetched
        self.write()

    def write(self) -> None:
        """Write the record; a folder with one is known as one that was fetched into."""
        document = {
            "version": RECORD_VERSION,
            "source": self.source,
            "files": {key: vars(item) for key, item in sorted(self.files.items())},
        }
        write_json(self.folder / RECORD_NAME, document)

    def is_done(self, file: RemoteFile) -> bool:
        """Whether a file as it is published now is here, its outputs read and found unchanged."""
        known = self.files.get(file.name)
        if known is None or file.size not in (None, known.size):
            return False
        changed = None not in (file.version, known.version) and file.version != known.version
        if changed or file.sha256 not in (None, known.sha256) or not known.outputs:
            return False
        paths = {self.folder / name: digest for name, digest in known.outputs.items()}
        return all(path.is_file() and sha256_file(path) == paths[path] for path in paths)


def _parse(folder: Path, item: dict[str, Any]) -> FetchedFile:
    outputs = {
        relative_inside(folder, name, f"{folder / RECORD_NAME}, outputs"): str(digest)
        for name, digest in item["outputs"].items()
    }
    return FetchedFile(
        size=int(item["size"]),
        version=item["version"],
        sha256=str(item["sha256"]),
        outputs=outputs,
    )
