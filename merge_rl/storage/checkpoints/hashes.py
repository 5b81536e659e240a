"""Hashes of a set's files: found once, kept until a file changes, held against what is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from merge_rl.errors import HashMismatchError
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
