"""Image files in a folder or a zip: found by content, named in natural order, decoded one by one.

A zip is read in place and never unpacked.
"""

from __future__ import annotations

import hashlib
import stat
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

from merge_rl.errors import ImageError
from merge_rl.storage.files.archives import DAMAGE, Archive
from merge_rl.storage.files.images import (
    SUFFIXES,
    Labels,
    Pixels,
    decode_image,
    is_image,
    other_image,
    parse_labels,
)
from merge_rl.storage.files.naming import natural_key
from merge_rl.untrusted import describe, load_json_mapping, open_file, pointer_problem, reason

LABELS_NAME: Final = "dataset.json"
MAX_FILE_BYTES: Final = 256 * 2**20
_SHOWN: Final = 8  # kinds of files left out that are told apart


@dataclass(frozen=True)
class _File:
    name: str  # relative, with "/"
    stamp: str  # changes when the file does
    size: int
    place: Path | zipfile.ZipInfo


@dataclass
class _Found:
    """What lies in a folder or a zip."""

    images: list[_File] = field(default_factory=list)
    labels: list[_File] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


class ImageFiles:
    """The images of a folder, with its subfolders, or of a zip, in natural order of their names.

    Files with the usual endings of images are images; of others the content tells. Hidden files are
    left out, links to folders followed once each. `left_out` counts what was left out, by reason.

    Labels come from every `dataset.json` ({"labels": [["a/b.png", 3], ...]}, relative to where it
    lies): whole numbers for all images, or none, and then `label_problem` says why.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: Archive | None = None
        if not path.is_dir():
            self._archive = Archive(lambda: open_file(path, ImageError), str(path), ImageError)
        found = _of_archive(self._archive) if self._archive else _of_folder(path)
        self.left_out = found.left_out
        self._files = sorted(found.images, key=lambda file: natural_key(file.name))
        if not self._files:
            also = f"; {self.left_out_text}" if self.left_out else ""
            raise ImageError(f"{path}: expected images ({', '.join(SUFFIXES)}), found none{also}")
        self.labels, self.label_problem = self._read_labels(found.labels)

    def __len__(self) -> int:
        return len(self._files)

    def name(self, row: int) -> str:
        """Name of an image, for messages."""
        return self._files[row].name

    @property
    def left_out_text(self) -> str:
        """How many files were left out, and why; "" for none."""
        if not self.left_out:
            return ""
        shown = self.left_out.most_common(_SHOWN)
        rest = self.left_out.total() - sum(count for _, count in shown)
        parts = [f"{count} {why}" for why, count in shown] + ([f"{rest} others"] if rest else [])
        return f"{self.left_out.total()} left out of {self.path}: {', '.join(parts)}"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of names, sizes and times, or in a zip check sums: other images, other value."""
        lines = [f"{file.name}\n{file.stamp}\n" for file in self._files]
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

    def decode(self, row: int) -> Pixels:
        """An image (H, W, 1 or 3); ImageError, naming it, where it cannot be read."""
        return decode_image(self._bytes(self._files[row]), self._files[row].name)

    def _bytes(self, file: _File, limit: int = MAX_FILE_BYTES) -> bytes:
        try:
            with _opened(file, self._archive) as stream:
                data = stream.read(limit + 1)
        except DAMAGE as error:
            raise ImageError(f"{file.name}: cannot be read: {reason(error)}") from None
        if len(data) > limit:
            raise ImageError(f"{file.name}: larger than {limit} bytes, the most that is read")
        return data

    def _read_labels(self, files: list[_File]) -> Labels:
        loose: dict[str, object] = {}
        exact: dict[str, object] = {}
        problem = ""
        for file in sorted(files, key=lambda file: natural_key(file.name)):
            where = f"{self.path}, {file.name}"
            content = self._bytes(file)
            if pointer := pointer_problem(content):
                raise ImageError(f"{where}: {pointer}")
            pairs = load_json_mapping(content, where).get("labels")
            if not pairs:
                problem = f"{where} holds no labels"
                continue
            given = _pairs(pairs, where)
            folder = _plain(file.name[: -len(LABELS_NAME)])
            exact |= {folder + name: value for name, value in given.items()}
            loose |= given  # some name their images from the top, wherever the file itself lies
        known = {**loose, **exact}
        if not known:
            return Labels(problem=problem)
        lacking = [file.name for file in self._files if _plain(file.name) not in known]
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            verb = "have" if more else "has"
            where = f"{self.path}, {', '.join(file.name for file in files)}"
            raise ImageError(f"{where}: {lacking[0]}{more} {verb} no label")
        return parse_labels((known[_plain(file.name)] for file in self._files), self.name)


def _plain(name: str) -> str:
    """A name as others may have written it: on Windows, or from the folder it lies in."""
    return name.replace("\\", "/").removeprefix("./")


def _pairs(pairs: object, where: str) -> dict[str, object]:
    """Name -> label of a list of [name, label], or of a mapping.

    ImageError for others, and for two labels of one name.
    """
    found: dict[str, object] = {}
    pairs = list(map(list, pairs.items())) if isinstance(pairs, dict) else pairs
    if odd := [p for p in _listed(pairs) if not isinstance(p, list) or len(p) != 2]:
        raise ImageError(
            f"{where}: expected labels as a list of [name, label], found {describe(odd[0])}"
        )
    for name, value in ((_plain(str(name)), value) for name, value in _listed(pairs)):
        known = found.setdefault(name, value)
        if known is not value and known != value:  # NaN is no other than itself
            both = f"{known!r:.40} and {value!r:.40}"
            raise ImageError(f"{where}: {name} has two labels, {both}")
    return found


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _opened(file: _File, archive: Archive | None) -> IO[bytes]:
    if isinstance(file.place, Path):
        return open_file(file.place, ImageError)
    assert archive is not None
    return archive.entry(file.place)


def _sort_in(found: _Found, file: _File, archive: Archive | None) -> None:
    """Add a file to the images, to the labels, or to what is left out."""
    if file.name.replace("\\", "/").rpartition("/")[2].lower() == LABELS_NAME:
        found.labels.append(file)
    elif file.name.lower().endswith(SUFFIXES) or _holds_image(file, archive):
        found.images.append(file)
    else:
        suffix = PurePosixPath(file.name).suffix.lower()
        what = "images of a kind that is not read" if other_image(suffix) else "no images"
        found.left_out[f"{what} ({suffix[:12] or 'without ending'})"] += 1


def _holds_image(file: _File, archive: Archive | None) -> bool:
    if file.size > MAX_FILE_BYTES:
        return False
    try:
        with _opened(file, archive) as stream:
            return is_image(stream)
    except (ImageError, *DAMAGE):
        return False


def _of_archive(archive: Archive) -> _Found:
    found = _Found()
    for member in archive.infolist():
        if member.is_dir():
            continue
        if any(_hidden(part) for part in member.filename.split("/")):
            found.left_out["hidden"] += 1
            continue
        stamp = f"{member.file_size} {member.CRC:08x}"
        _sort_in(found, _File(member.filename, stamp, member.file_size, member), archive)
    return found


def _hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"  # an archiver's own


def _of_folder(root: Path) -> _Found:
    found, seen = _Found(), set[tuple[int, int]]()
    # Plain folders first: what can be reached without a link keeps its own name.
    folders, links = [(root, "")], list[tuple[Path, str]]()
    while folders or links:
        folder, prefix = folders.pop() if folders else links.pop(0)
        try:
            status = folder.stat()
            known = (status.st_dev, status.st_ino)
            above = prefix and root.resolve().is_relative_to(folder.resolve())
            if known in seen or above:
                found.left_out["links to folders that are read already"] += 1
                continue
            seen.add(known)
            for entry in sorted(folder.iterdir()):
                name = f"{prefix}{entry.name}"
                if _hidden(entry.name):
                    found.left_out["hidden"] += 1
                elif entry.is_dir():
                    (links if entry.is_symlink() else folders).append((entry, f"{name}/"))
                else:
                    _add(found, entry, name)
        except OSError as error:
            raise ImageError(
                f"{error.filename or folder}: cannot be read: {reason(error)}"
            ) from None
    return found


def _add(found: _Found, entry: Path, name: str) -> None:
    needed = name.lower().endswith(SUFFIXES) or entry.name.lower() == LABELS_NAME
    try:
        status = entry.stat()
    except OSError as error:
        if needed:
            raise ImageError(f"{entry}: cannot be read: {reason(error)}") from None
        found.left_out["links to nothing"] += 1
        return
    if not stat.S_ISREG(status.st_mode):
        found.left_out["no files (pipes, sockets, devices)"] += 1
        return
    stamp = f"{status.st_size} {status.st_mtime_ns}"
    _sort_in(found, _File(name, stamp, status.st_size, entry), None)
