"""A set of checkpoints of one training run: its files, what they are in training time, its weights.

It is opened lazily and checked for agreement.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_rl.errors import CheckpointError, MergeRLError
from merge_rl.late import torch
from merge_rl.storage.checkpoints.hashes import FileHashes, find_duplicates, without
from merge_rl.storage.checkpoints.listing import (
    Listing,
    list_folder,
    named_alike,
    progress,
    read_headers,
    select_entries,
)
from merge_rl.storage.checkpoints.manifest import Manifest, SetDefaults
from merge_rl.storage.files import (
    Progress,
    StoredWeights,
    TensorInfo,
    WeightsReader,
    left_out,
    nearest,
    require_finite,
    tensor_bytes,
)

if TYPE_CHECKING:
    from torch import Tensor

    from merge_rl.core.merging.ema_profiles import Profiles


@dataclass(frozen=True, kw_only=True)
class FileCheck:
    """Outcome of verifying one file; a failure is data, so that the other files are checked too."""

    index: int
    name: str
    path: Path
    sha256: str | None  # None if the file could not be read
    recorded: bool  # whether the manifest has a hash to compare with
    error: MergeRLError | None

    @property
    def ok(self) -> bool:
        """Whether the file could be read and is what the manifest says."""
        return self.error is None


class CheckpointSet:
    """Checkpoints of one run, equal in tensor names, shapes and dtypes.

    Made by `open_checkpoints`. `names`, `paths`, `entries`, `nimg` and `ema_std` share the order of
    the indices.
    """

    def __init__(
        self,
        listing: Listing,
        headers: Sequence[StoredWeights],
        config: dict[str, Any] | None,
        duplicates: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = listing.folder
        self.manifest: Manifest | None = listing.manifest
        self.entries = listing.entries
        self.names: tuple[str, ...] = listing.names
        self.config = config
        self.duplicates: Mapping[str, str] = duplicates or {}  # name -> the name it repeats
        self._headers = tuple(headers)
        recorded = [entry.sha256 for entry in self.entries]
        self.hashes = FileHashes(self.paths, self._headers, recorded)

    def describe(self, config: dict[str, Any]) -> None:
        """Take the weights for those of the network of `config`, under its tensors' names."""
        self.config, self._headers = config, tuple(named_alike(self._headers, config))

    @property
    def title(self) -> str:
        """What the set is called: by its manifest, its folder, or that above one of any run."""
        if self.manifest and self.manifest.name:
            return self.manifest.name
        folder = self.folder.resolve()
        generic = folder.name in ("checkpoints", "ckpts", "ckpt") and folder.parent.name
        return folder.parent.name if generic else folder.name

    def __repr__(self) -> str:
        return f"CheckpointSet({str(self.folder)!r}, {len(self)} checkpoints)"

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def nimg(self) -> list[int | None]:
        """Training images seen, per checkpoint."""
        return [entry.nimg for entry in self.entries]

    @property
    def ema_std(self) -> list[float | None]:
        """Relative EMA width per checkpoint, None for raw weights."""
        return [entry.ema_std for entry in self.entries]

    @cached_property
    def ema_gamma(self) -> list[float | None]:
        """Exponent of the average per checkpoint, of which ema_std is the width; None for raw."""
        from merge_rl.core.merging.ema_profiles import exponent_from_std

        stated = [entry.ema_gamma for entry in self.entries]
        widths = [exponent_from_std(w) if w is not None else None for w in self.ema_std]
        return [
            width if gamma is None else gamma for gamma, width in zip(stated, widths, strict=True)
        ]

    @property
    def ema_start(self) -> float:
        """Training images seen when the averages began; 0 where the manifest says nothing.

        Raises CheckpointError where averages began at different times.
        """
        averages = [e for e in self.entries if e.ema_std is not None or e.ema_gamma is not None]
        starts = sorted({entry.ema_start or 0.0 for entry in averages})
        if len(starts) > 1:
            raise CheckpointError(
                f"{self.folder}: averages that began at {starts[0]:g} and at {starts[-1]:g} images;"
                " expected those of one run, from one time on (choose a series with --track)"
            )
        return starts[0] if starts else 0.0

    def profiles(self) -> Profiles | None:
        """The averages' profiles in time; None where a checkpoint's is not known."""
        from merge_rl.core.merging.ema_profiles import Profiles

        return Profiles.known(self.nimg, self.ema_gamma, self.ema_start)

    @property
    def tracks(self) -> list[str]:
        """The distinct tracks, in order of appearance."""
        return list(dict.fromkeys(entry.track for entry in self.entries if entry.track))

    @property
    def newest(self) -> int:
        """Index of the largest (nimg, ema_std); the last one if some nimg is unknown."""
        indices = range(len(self))
        if any(nimg is None for nimg in self.nimg):
            return indices[-1]
        return max(indices, key=lambda i: (*progress(self.entries[i]), i))

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """The files, in the order of the set."""
        return tuple(self.folder / entry.file for entry in self.entries)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name -> shape and dtype, in the order of the first file; the same for every file."""
        return self._headers[0].tensors

    @property
    def defaults(self) -> SetDefaults:
        """The manifest's defaults with paths under the folder; empty without a manifest."""
        return (self.manifest.defaults if self.manifest else SetDefaults()).resolved(self.folder)

    @property
    def notes(self) -> list[str]:
        """What a user should hear of the set, a sentence each."""
        notes = [
            f"{self.folder}: {name} and {kept} are the same weights and count once, as {kept}"
            for name, kept in self.duplicates.items()
        ]
        if left := self._headers[0].left_text:
            notes.append(f"{self.folder}: {left}")
        return notes if self.manifest else [*notes, *left_out(self.folder, self.paths)]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(header.file_bytes for header in self._headers)

    @property
    def licences(self) -> list[str]:
        """The licences that the files are stated to be under, each once."""
        common = self.manifest.licence if self.manifest else None
        stated = dict.fromkeys(entry.licence or common for entry in self.entries)
        return [licence for licence in stated if licence]

    @property
    def licence(self) -> str | None:
        """Licence of the weights; several are listed with commas, None if not stated."""
        return ", ".join(self.licences) or None

    def metadata(self, index: int) -> Mapping[str, str]:
        """The metadata stored in one file."""
        return self._headers[index].metadata

    def read(self, index: int) -> dict[str, Tensor]:
        """All tensors of one checkpoint on the CPU, as stored; finite, and of the recorded hash.

        The hash is compared when the file is read first, and again after it has changed.
        """
        return self._load(index, hashed=index in self.hashes.to_compare())

    def read_tensor(self, index: int, name: str) -> Tensor:
        """One tensor of one checkpoint, without the rest of the file; finite, hash not compared."""
        if name not in self.tensors:
            hint = nearest(name, self.tensors)
            raise CheckpointError(f"{self.paths[index]}: no tensor {name!r}{hint}")
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        with self.reader(index) as reader:
            reader.fill(name, 0, tensor_bytes(tensor))
        require_finite(self.paths[index], name, tensor)
        return tensor

    def reader(self, index: int, *, hashed: bool = False) -> WeightsReader:
        """One file opened to read parts of its tensors; neither hash nor values are checked."""
        return self._headers[index].reader(hashed=hashed)

    def in_order(self, index: int) -> tuple[str, ...]:
        """The tensors as they follow one another in one file."""
        return self._headers[index].in_order

    def mapped(self, index: int) -> dict[str, Tensor]:
        """All tensors of one checkpoint as views of the file, which stays on disk.

        Checked first, in pieces: values finite, and the hash the recorded one.
        """
        if index in self.hashes.to_compare():
            self.hashes.learn(index, self.hashes.stamp(index))
        weights = self._headers[index].mapped()
        for name, tensor in weights.items():
            require_finite(self.paths[index], name, tensor)
        return weights

    def sha256(self, index: int, progress: Progress | None = None) -> str:
        """SHA-256 of one file, kept until the file changes; not compared with the manifest."""
        return self.hashes.get(index, progress)

    def verify(self) -> Iterator[FileCheck]:
        """Read and check every file: structure, finite values, hash. One result a file."""
        for index, entry in enumerate(self.entries):
            error: MergeRLError | None = None
            self.hashes.forget(index)
            try:
                self._check(index)
            except CheckpointError as found:
                error = found
            yield FileCheck(
                index=index,
                name=self.names[index],
                path=self.paths[index],
                sha256=self.hashes.known(index),
                recorded=entry.sha256 is not None,
                error=error,
            )

    def _check(self, index: int) -> None:
        stamp = self.hashes.stamp(index)
        digest, problem = self._headers[index].check()
        self.hashes.learn(index, stamp, digest)
        if problem:
            raise problem

    def _load(self, index: int, *, hashed: bool) -> dict[str, Tensor]:
        stamp = self.hashes.stamp(index)
        weights, digest = self._headers[index].read(hashed=hashed)
        if digest is not None:
            self.hashes.learn(index, stamp, digest)
        for name, tensor in weights.items():
            require_finite(self.paths[index], name, tensor)
        return weights


def open_checkpoints(
    path: str | os.PathLike[str],
    *,
    track: str | None = None,
    select: Sequence[str] | None = None,
    distinct: bool = True,
) -> CheckpointSet:
    """`merge_rl.open_checkpoints`, of a folder that lies here."""
    listing = select_entries(list_folder(Path(path)), track=track, select=select)
    headers, config = read_headers(listing)
    repeated = find_duplicates(listing, headers)
    duplicates = {listing.names[i]: listing.names[kept] for i, kept in repeated.items()}
    if distinct:
        listing, headers = without(listing, headers, repeated)
    return CheckpointSet(listing, headers, config, duplicates)
