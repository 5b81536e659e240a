"""Bytes of a set's files: hashes, found once and held against what is known, and files held twice.

A file may be there twice as a link `last`, as a copy, or written under two names.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeAlias

from merge_rl.errors import HashMismatchError
from merge_rl.storage.checkpoints.listing import Listing
from merge_rl.storage.files import Progress, StoredWeights, require_hash

Stamp: TypeAlias = tuple[tuple[int, int], ...]
"""Size and time of change of the files: another value after a change."""


class FileHashes:
    """SHA-256 by index; `recorded` are those that a manifest has."""

    def __init__(
        self,
        paths: Sequence[Path],
        stored: Sequence[StoredWeights],
        recorded: Sequence[str | None],
    ) -> None:
        self._paths, self._stored, self._recorded = paths, stored, recorded
        self._demanded: dict[int, tuple[str, Callable[[str], str]]] = {}
        self._kept: dict[int, tuple[Stamp, str]] = {}  # hash, and the stamp that it belongs to

    def stamp(self, index: int) -> Stamp:
        """What `keep` and `learn` expect, taken before the file is read."""
        return self._stored[index].stamp()

    def get(self, index: int, progress: Progress | None = None) -> str:
        """The hash of one file, not compared with anything."""
        found = self.known(index)
        if found is None:
            stamp = self.stamp(index)
            found = self._stored[index].sha256(progress)
            self._kept[index] = (stamp, found)
        return found

    def known(self, index: int) -> str | None:
        """The hash, if it was found since the file changed last."""
        kept = self._kept.get(index)
        return kept[1] if kept and kept[0] == self.stamp(index) else None

    def forget(self, index: int) -> None:
        """Find the hash anew when it is asked for next."""
        self._kept.pop(index, None)

    def demand(self, index: int, digest: str, message: Callable[[str], str]) -> None:
        """Refuse a file that has another hash, when that is known; the message tells of it."""
        self._demanded[index] = digest, message

    def to_compare(self) -> list[int]:
        """The files of which a hash is recorded or demanded, but was not found so far."""
        demanded = {index: digest for index, (digest, _) in self._demanded.items()}
        return [
            index
            for index, recorded in enumerate(self._recorded)
            if any(
                expected is not None and self.known(index) != expected
                for expected in (recorded, demanded.get(index))
            )
        ]

    def missing(self) -> list[int]:
        """The files whose hash is not known, or was not compared."""
        unknown = {index for index in range(len(self._paths)) if self.known(index) is None}
        return sorted(unknown.union(self.to_compare()))

    def learn(self, index: int, stamp: Stamp, found: str | None = None) -> None:
        """Keep the hash that a file had at `stamp`, read if it is not given, and compare it.

        Raises HashMismatchError for another than is recorded or demanded.
        """
        found = found or self._stored[index].sha256()
        self._kept[index] = (stamp, found)
        demanded, message = self._demanded.get(index, (found, str))
        if found != demanded:
            raise HashMismatchError(message(found))
        require_hash(self._paths[index], found, self._recorded[index])

    def compare(self) -> None:
        """Find and compare every hash that was not compared yet."""
        for index in self.to_compare():
            self.learn(index, self.stamp(index))


SAMPLES: Final = 64
SAMPLE_BYTES: Final = 4096
CHUNK: Final = 2**22  # bytes compared at a time


def find_duplicates(listing: Listing, headers: Sequence[StoredWeights]) -> dict[int, int]:
    """Index -> index of the checkpoint that it repeats: one file, or tensors of equal bytes.

    Of a group the one stays whose name tells most: no link, a known progress, a number in its
    name, the first. From files that differ, samples of 256 KiB are read at most. What is not the
    file that its manifest records repeats nothing: it stays, to be refused.
    """
    groups: list[list[int]] = []
    for alike in _alike(headers):
        groups += _equal(alike, listing, headers)
    found: dict[int, int] = {}
    for group in groups:
        kept = min(group, key=lambda index: _rank(listing, index))
        recorded = listing.entries[kept].sha256
        for index in group:
            own = listing.entries[index].sha256
            if index != kept and (own in (None, recorded) or own == headers[index].sha256()):
                found[index] = kept
    return found


def without(
    listing: Listing, headers: Sequence[StoredWeights], repeated: dict[int, int]
) -> tuple[Listing, list[StoredWeights]]:
    """The listing, and its headers, without the checkpoints that repeat others."""
    keep = [index for index in range(len(listing.names)) if index not in repeated]
    entries = tuple(listing.entries[index] for index in keep)
    names = tuple(listing.names[index] for index in keep)
    return replace(listing, entries=entries, names=names), [headers[index] for index in keep]


def _rank(listing: Listing, index: int) -> tuple[bool, bool, bool, int]:
    path, entry = listing.path(index), listing.entries[index]
    return path.is_symlink(), entry.nimg is None, not re.search("[0-9]", path.stem), index


def _alike(headers: Sequence[StoredWeights]) -> list[list[int]]:
    """Groups of two and more whose samples agree."""
    groups: dict[str, list[int]] = {}
    if len(headers) > 1:
        for index, header in enumerate(headers):
            names = list(headers[0].tensors)
            groups.setdefault(_digest(header, names), []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def _digest(stored: StoredWeights, names: Sequence[str]) -> str:
    """Hash of samples that are spread evenly over the values, tensor after tensor of `names`."""
    total = sum(info.nbytes for info in stored.tensors.values())
    targets = [total * i // SAMPLES for i in range(SAMPLES)]
    digest, begin = hashlib.sha256(), 0
    with stored.reader() as reader:
        for name in names:
            held = stored.tensors[name].nbytes
            for target in (t for t in targets if begin <= t < begin + held):
                start = target - begin
                digest.update(reader.read_bytes(name, start, min(SAMPLE_BYTES, held - start)))
            begin += held
    return digest.hexdigest()


def _equal(
    alike: Sequence[int], listing: Listing, headers: Sequence[StoredWeights]
) -> list[list[int]]:
    """Of checkpoints that may be equal, the groups of those that are."""
    groups: list[list[int]] = []
    for index in alike:
        for group in groups:
            first = group[0]
            one_file = listing.path(index).samefile(listing.path(first))
            if one_file or _same_bytes(headers[index], headers[first]):
                group.append(index)
                break
        else:
            groups.append([index])
    return [group for group in groups if len(group) > 1]


def _same_bytes(one: StoredWeights, other: StoredWeights) -> bool:
    with one.reader() as first, other.reader() as second:
        for name, info in one.tensors.items():
            for start in range(0, info.nbytes, CHUNK):
                size = min(CHUNK, info.nbytes - start)
                if first.read_bytes(name, start, size) != second.read_bytes(name, start, size):
                    return False
    return True
