"""Typed fields of untrusted documents, and the hashes they name, with refusals that say why."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

from merge_rl.config import real_number, whole_number
from merge_rl.errors import CheckpointError, HashMismatchError, ManifestError
from merge_rl.untrusted import Refusal, describe, open_file, reason


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


_FIRST_BYTES: Final[Mapping[bytes, str]] = {
    b"PK\x03\x04": "an archive as torch.save writes (.pt)",
    b"\x80": "a pickle",
    b"PK\x05\x06": "an empty archive",
    b"\x1f\x8b": "a compressed file (gzip)",
    b"\x93NUMPY": "an array of NumPy (.npy)",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF file",
    b"<": "a page of the web, which a download may leave in the place of a file",
    b"{": "a JSON document",
}


def kind_by_content(first: bytes) -> str | None:
    """What a file is by its first bytes, in words; None where they do not tell."""
    if first[8:9] == b"{" and first[4:8] == bytes(4):
        return "a safetensors file"
    known = (words for begin, words in _FIRST_BYTES.items() if first.startswith(begin))
    return next(known, "text" if _is_text(first[:32]) else None)


def _is_text(content: bytes) -> bool:
    """Whether content is lines, the first of which is no word alone: old pickles begin with one."""
    line, *_ = lines = content.splitlines()[:8] or [b""]
    printable = content.isascii() and all(part.decode("ascii").isprintable() for part in lines)
    return printable and len(line) > 3 and (b" " in line.strip() or len(lines) == 1)


def require_plain(value: object, where: str) -> None:
    """Refuse what JSON cannot hold: dates, bytes, sets, keys that are not text."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ManifestError(f"{where}: expected text as key, found {describe(key)}")
            require_plain(item, f"{where}, {key}")
    elif isinstance(value, list):
        for position, item in enumerate(value):
            require_plain(item, f"{where}[{position}]")
    elif value is not None and not isinstance(value, (str, int, float, bool)):
        expected = "text, a number, true, false, a list or a mapping"
        raise ManifestError(f"{where}: expected {expected}, found {describe(value)}")


class Fields:
    """One mapping of a document, at `where` (file and place, for messages).

    Unknown and missing keys are refused on construction, wrong types on access. A key whose
    value is null counts as left out.
    """

    def __init__(
        self, value: object, where: str, *, required: Iterable[str], optional: Iterable[str] = ()
    ) -> None:
        if not isinstance(value, dict):
            raise ManifestError(f"{where}: expected a mapping, found {describe(value)}")
        required, known = list(required), [*required, *optional]
        for key in value:
            if key not in known:
                hint = nearest(str(key), known)
                listed = ", ".join(known)
                raise ManifestError(f"{where}: unknown key {key!r}{hint} (known: {listed})")
        for key in required:
            if value.get(key) is None:
                raise ManifestError(f"{where}: the key {key!r} is missing")
        self.where, self._value = where, value

    def __contains__(self, key: str) -> bool:
        return self._value.get(key) is not None

    def raw(self, key: str) -> object:
        """The value as it is, None when left out."""
        return self._value.get(key)

    def refuse(self, key: str, expected: str) -> ManifestError:
        """The error for a value that is not what was expected."""
        found = describe(self._value.get(key))
        return ManifestError(f"{self.where}, {key}: expected {expected}, found {found}")

    def text(self, key: str) -> str | None:
        value = self.raw(key)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise self.refuse(key, "text")
        return value if value is None else str(value)

    def needed_text(self, key: str) -> str:
        value = self.text(key)
        if value is None:
            raise self.refuse(key, "text")
        return value

    def flag(self, key: str) -> bool | None:
        value = self.raw(key)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def count(self, key: str) -> int | None:
        """A whole number that is not negative."""
        value = self.raw(key)
        if value is None:
            return None
        number = whole_number(value)
        if number is None or number < 0:
            raise self.refuse(key, "a whole number of at least 0, within 64 bits")
        return number

    def number(self, key: str) -> float | None:
        value = self.raw(key)
        if value is None:
            return None
        number = real_number(value)
        if number is None:
            raise self.refuse(key, "a number")
        return number

    def entries(self, key: str) -> list[object]:
        value = self.raw(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.refuse(key, "a list")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """A mapping of plain data, empty when left out."""
        value = self.raw(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.refuse(key, "a mapping")
        require_plain(value, f"{self.where}, {key}")
        return value


Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@contextmanager
def reading_from(path: Path, refusal: Refusal = CheckpointError) -> Iterator[BinaryIO]:
    """A file as `open_file` opens it; an error of the system on the way names it too."""
    try:
        with open_file(path, refusal) as file:
            yield file
    except OSError as error:
        raise refusal(f"{path}: cannot be read: {reason(error)}") from None


CHUNK_BYTES = 16 * 2**20


def sha256_file(path: Path, progress: Progress | None = None) -> str:
    """Hexadecimal SHA-256 of a file of any size, in constant memory."""
    digest, done = hashlib.sha256(), 0
    with reading_from(path) as file:
        total = os.fstat(file.fileno()).st_size
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, total)
    return digest.hexdigest()


def require_hash(path: Path, found: str, expected: str | None) -> None:
    """Refuse a file whose hash is not the recorded one; None means nothing was recorded."""
    if expected is not None and found != expected:
        raise HashMismatchError(
            f"{path}: SHA-256 is {found}, but the manifest records {expected}: "
            "the file was damaged or replaced"
        )
