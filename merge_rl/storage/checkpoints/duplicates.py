"""Checkpoints that a folder holds twice: a link `last`, a copy, a file written under two names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from merge_rl.storage.checkpoints.listing import Listing
from merge_rl.storage.files import StoredWeights

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
