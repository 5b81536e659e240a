"""Atomic writes: a file under its final name is always complete.

Whatever ends a program half-way (an error, a full disk, a power cut) leaves either the old file
or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from merge_rl.config import yaml_text
from merge_rl.errors import (
    CheckpointError,
    ConfigError,
    MergeRLError,
    NonFiniteWeightsError,
    RunError,
)
from merge_rl.storage.files.locks import is_vacant, locked_output, temporary_beside
from merge_rl.storage.files.safetensors_file import read_file, write_tensors
from merge_rl.untrusted import load_json_mapping, parse_json, read_bounded

if TYPE_CHECKING:
    from torch import Tensor


def as_path(given: object, what: str) -> Path:
    """A path that a caller from Python gave as `what`; ConfigError for anything else."""
    if not isinstance(given, (str, os.PathLike)):
        raise ConfigError(f"expected a path as {what}, got {type(given).__name__}")
    return Path(given)


def spellings(path: str | os.PathLike[str]) -> list[Path]:
    """Where a path lies, absolute: as it was given, then with the links of its folder, then its
    own, followed.

    What describes a file may lie beside the link (the Hub's cache) or beside the file.
    """
    given = absolute(path)
    return list(dict.fromkeys([given, followed(given.parent) / given.name, followed(given)]))


def followed(path: str | os.PathLike[str]) -> Path:
    """A path from the root with all links followed; one that leads to itself is left as it is."""
    return Path(os.path.realpath(path))  # Path.resolve raises for such a link, until Python 3.13


def absolute(path: str | os.PathLike[str]) -> Path:
    """A path from the root. Links keep their names, of which the ending tells what a file is."""
    return Path(os.path.normpath(Path(path).absolute()))


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Temporary path to write to; becomes `path` on leaving the block, or vanishes on an error.

    The body writes one file there. It lies in the same folder (made when missing), because a
    rename is atomic only within a file system, and keeps the ending, which some writers go by.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    try:
        with told_of(target, temporary):
            yield temporary
            _sync(temporary)
            temporary.replace(target)
    except BaseException:
        with suppress(OSError):  # where nothing can be written, nothing can be removed
            temporary.unlink(missing_ok=True)
        raise
    # Not every file system lets a folder be synced; the file itself is safe by now.
    with suppress(OSError):
        _sync(target.parent)


@contextmanager
def told_of(target: Path, temporary: Path) -> Iterator[None]:
    """Context in which errors of disk and weights name the file that was to be written.

    A full disk names no file by itself, a copy its source, and the rest a temporary.
    """
    try:
        yield
    except NonFiniteWeightsError as error:
        raise type(error)(str(error).replace(str(temporary), str(target))) from None
    except OSError as error:
        told = error.filename2 or error.filename  # of a copy, where it goes
        named = Path(told) if isinstance(told, (str, Path)) else None
        if named is not None and named.is_relative_to(temporary):
            target = target / named.relative_to(temporary)
        elif error.errno is None or (named not in (None, target) and error.errno not in _FULL):
            raise
        reason = (error.strerror or "").removeprefix(_UNWRITABLE)
        raise OSError(error.errno, f"{_UNWRITABLE}{reason}", str(target)) from None


_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNWRITABLE: Final = "cannot be written: "


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically, line ends as given.

    Bytes of a file's name that are no text are written as JSON writes what they are read as.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write one JSON document atomically; ValueError for NaN and infinity, which JSON lacks."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_yaml(path: str | os.PathLike[str], value: object) -> None:
    """Write one YAML document of plain data atomically, keys in the order given."""
    write_text(path, yaml_text(value, width=100))


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file atomically; equal input gives equal bytes.

    Tensors of any device and memory layout are taken; they may share memory.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        write_tensors(file, tensors, metadata or {})


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


KEY_NAME: Final = "key.json"


class WorkFolder:
    """Files of one unfinished job, kept under a key: everything that its result depends on.

    The folder, hidden, appears with the first file.
    What lies there under another key is of no use and is removed on opening.
    """

    def __init__(self, output: Path, key: Mapping[str, Any]) -> None:
        self.path = output.with_name(f".{output.name}.partial")
        self._key = json.loads(json.dumps(dict(key)))
        if self.path.exists() and not self._is_ours():
            raise RunError(f"{self.path} is in the way; expected the unfinished work of this job")
        if self.path.exists() and self._recorded() != self._key:
            shutil.rmtree(self.path)

    def write(self, name: str, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
        """Replace a file of tensors and a note of plain data, atomically."""
        if not self.path.exists():
            self.path.mkdir(parents=True)
            write_json(self.path / KEY_NAME, self._key)
        save_tensors(self.path / f"{name}.safetensors", tensors, {"note": json.dumps(dict(note))})

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was written under that name; None if nothing was, or if it is damaged."""
        file = self.path / f"{name}.safetensors"
        if not file.is_file():
            return None
        try:
            header, tensors, _ = read_file(file, hashed=False)
            return tensors, load_json_mapping(header.metadata["note"], str(file))
        except (CheckpointError, KeyError):
            return None

    def remove(self) -> None:
        """The job is done."""
        if self.path.exists():
            shutil.rmtree(self.path)

    def _is_ours(self) -> bool:
        return self.path.is_dir() and (
            (self.path / KEY_NAME).is_file() or not any(self.path.iterdir())
        )

    def _recorded(self) -> object:
        try:
            return parse_json(read_bounded(self.path / KEY_NAME), str(self.path))
        except MergeRLError:
            return None


State = tuple[dict[str, "Tensor"], dict[str, Any]]
"""Tensors by name, and plain values."""


def write_state(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write a resume point, or replace the one that is there: whole or not at all."""
    save_tensors(path, dict(tensors), {"state": json.dumps(dict(values))})


def read_state(path: Path) -> State:
    """A resume point; RunError names a file that is damaged or something else."""
    try:
        header, tensors, _ = read_file(path, hashed=False)
        return tensors, load_json_mapping(header.metadata["state"], str(path))
    except KeyError:
        reason = "its header holds no state"
    except CheckpointError as error:
        reason = str(error).removeprefix(f"{path}: ")
    raise RunError(f"{path}: damaged resume point: {reason}")


def counts_of(values: Mapping[str, Any], *names: str, least: int = 0) -> dict[str, int]:
    """Whole numbers of a resume point, by name; ValueError for what is none, or below `least`."""
    for name in names:
        if type(values[name]) is not int or not least <= values[name] < 2**63:
            raise ValueError(f"{name} is {values[name]!r:.60}, expected a whole number")
    return {name: values[name] for name in names}


def require_new(path: str | os.PathLike[str]) -> None:
    """Raise RunError if something lies at `path`."""
    if not is_vacant(Path(path)):
        raise RunError(f"{path} exists already; choose another folder")


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` if the block succeeds.

    An existing path is refused unless `replace` is set; then it is swapped at the end.
    """
    target = as_path(path, "the folder to write")
    if not replace:
        require_new(target)
    temporary = temporary_beside(target)
    with locked_output(target), told_of(target, temporary):
        try:
            temporary.mkdir()
            yield temporary
            if target.is_dir() and replace:
                shutil.rmtree(target)
            temporary.replace(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
