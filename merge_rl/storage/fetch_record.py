"""`fetch.json`: what a folder was fetched from, and which files of it are done."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from merge_rl.errors import CheckpointError, ConfigError
from merge_rl.storage.atomic import write_json
from merge_rl.storage.documents import load_json_mapping, read_bounded
from merge_rl.storage.hashing import sha256_file
from merge_rl.storage.manifest import relative_inside
from merge_rl.storage.snapshots import RemoteFile

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
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
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
