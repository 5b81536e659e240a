"""Weights of one network on disk: a `.safetensors`, or shards behind an index, read alike."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_rl.errors import CheckpointError
from merge_rl.storage.files.documents import CHUNK_BYTES, Progress, sha256_file
from merge_rl.storage.files.naming import (
    PARTS,
    PLAIN,
    SAVED,
    SHARED,
    convertible,
    in_training_order,
    is_convertible,
    is_weights_name,
    natural_key,
    weights_stem,
)
from merge_rl.storage.files.safetensors_file import TensorReader, check_file, map_file, read_file
from merge_rl.storage.files.safetensors_header import Header, TensorInfo, read_header
from merge_rl.storage.files.shards import INDEX_NAME, INDEX_SUFFIX, is_shard_name, parse_index

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredWeights:
    """What files hold of one network, its tensors not read yet. Made by `open_weights`."""

    path: Path  # the file, or the index of the shards
    parts: Mapping[Path, Header]
    homes: Mapping[str, Path]  # tensor -> the file it is in
    tensors: Mapping[str, TensorInfo]  # in the order of the file, or of the index
    metadata: Mapping[str, str]
    in_files: Mapping[str, str] = field(default_factory=dict)  # names of those called otherwise

    def renamed(self, names: Mapping[str, str]) -> StoredWeights:
        """The same under other names (new -> the one in the files); those not named are left."""
        return replace(
            self, in_files={n: self.in_files.get(known, known) for n, known in names.items()},
            homes={name: self.homes[known] for name, known in names.items()},
            tensors={name: self.tensors[known] for name, known in names.items()},
        )  # fmt: skip

    @property
    def left(self) -> list[str]:
        """The tensors of the files that have no name here."""
        known = set(self.in_files.values()) or set(self.tensors)
        return [name for part in self.parts.values() for name in part.tensors if name not in known]

    @property
    def left_text(self) -> str:
        """Which tensors were taken where the files hold others, as averages; "" where all were."""
        took = next(iter(self.in_files.values()), "")
        left = self.left
        return f"took {took} and its like, left {', '.join(left[:3])}, ..." if left else ""

    def _named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensors[self.in_files.get(name, name)] for name in self.tensors}

    @property
    def file_bytes(self) -> int:
        """Of all files that hold tensors."""
        return sum(header.file_bytes for header in self.parts.values())

    def read(self, *, hashed: bool) -> tuple[dict[str, Tensor], str | None]:
        """(tensors on the CPU as stored, SHA-256 or None), read once; see `read_file`."""
        tensors: dict[str, Tensor] = {}
        digests = []
        for file, known in self.parts.items():
            header, found, digest = read_file(file, hashed=hashed)
            if header.tensors != known.tensors:
                raise CheckpointError(f"{file}: the file has changed since the set was opened")
            tensors |= found
            digests.append(digest or "")
        return self._named(tensors), _joined(digests) if hashed else None

    def check(self) -> tuple[str, CheckpointError | None]:
        """(SHA-256, what is wrong with the values if anything), read once; see `check_file`."""
        found = [check_file(file, header) for file, header in self.parts.items()]
        problem = next((problem for _, problem in found if problem), None)
        return _joined([digest for digest, _ in found]), problem

    def reader(self, *, hashed: bool = False) -> WeightsReader:
        """The files opened to read parts of tensors; neither hashes nor values are checked."""
        return WeightsReader(self, hashed=hashed)

    @property
    def in_order(self) -> tuple[str, ...]:
        """The tensors as they follow one another in the files."""
        numbers = {file: number for number, file in enumerate(self.parts)}

        def place(name: str) -> tuple[int, int]:
            home = self.homes[name]
            return numbers[home], self.parts[home].begins[self.in_files.get(name, name)]

        return tuple(sorted(self.tensors, key=place))

    def mapped(self) -> dict[str, Tensor]:
        """All tensors as views of the files, which stay on disk; see `map_file`."""
        views: dict[str, Tensor] = {}
        for file, header in self.parts.items():
            views |= map_file(file, header)
        return self._named(views)

    def sha256(self, progress: Progress | None = None) -> str:
        """Of the file; of shards, that of their hashes in the order of their names."""
        return _joined([sha256_file(file, progress) for file in self.parts])

    def stamp(self) -> tuple[tuple[int, int], ...]:
        """Size and time of change of every file: another value after a change."""
        try:
            found = [file.stat() for file in self.parts]
        except OSError as error:
            reason = error.strerror or error
            raise CheckpointError(f"{self.path}: cannot be read: {reason}") from None
        return tuple((status.st_size, status.st_mtime_ns) for status in found)


class WeightsReader:
    """Open files from which parts of tensors are read; several threads may share it.

    Where `hashed`, whole tensors are read by one thread, in the order of the files, and what lies
    between them is read too: in the end `sha256` is that of the files.
    """

    def __init__(self, weights: StoredWeights, *, hashed: bool = False) -> None:
        self._homes, self._in_files = weights.homes, weights.in_files
        with ExitStack() as stack:
            self._readers = {
                file: stack.enter_context(TensorReader(file, header))
                for file, header in weights.parts.items()
            }
            self._files = stack.pop_all()
        self._digests = {file: hashlib.sha256() for file in weights.parts} if hashed else {}
        self._hashed = dict.fromkeys(self._digests, 0)  # bytes from the start of each file

    def __enter__(self) -> WeightsReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def fill(self, name: str, begin: int, target: memoryview) -> None:
        """Fill `target` with the bytes of a tensor from byte `begin` on."""
        file = self._homes[name]
        reader = self._readers[file]
        begin += reader.header.begins[self._in_files.get(name, name)]
        if file in self._digests:
            self._hash_until(file, begin)
        reader.fill(target, begin)
        if file in self._digests:
            self._digests[file].update(target)
            self._hashed[file] = begin + len(target)

    def read_bytes(self, name: str, begin: int, size: int) -> bytes:
        """`size` bytes of a tensor from byte `begin` on."""
        found = bytearray(size)
        self.fill(name, begin, memoryview(found))
        return bytes(found)

    def sha256(self) -> str:
        """Of the files, see `StoredWeights.sha256`; what was not read is read now."""
        for file, reader in self._readers.items():
            self._hash_until(file, reader.header.file_bytes)
        return _joined([digest.hexdigest() for digest in self._digests.values()])

    def _hash_until(self, file: Path, end: int) -> None:
        while (begin := self._hashed[file]) < end:
            piece = memoryview(bytearray(min(end - begin, CHUNK_BYTES)))
            self._readers[file].fill(piece, begin)
            self._digests[file].update(piece)
            self._hashed[file] += len(piece)


def weights_in(folder: Path) -> list[Path]:
    """What holds the weights of a network each, in natural order: `.safetensors`, and indexes.

    Of a folder without any, those of the networks within, as pipelines and training programs lay
    them out: `unet/`, `transformer/` and their averages (`unet_ema/`), or the same in
    `checkpoint-500/`, or a `model.safetensors` there, or one of another name in each. Shards are
    left to their index, hidden files (unfinished writes) aside. CheckpointError for shards without
    one, a part of a model being none, and for a link to nothing.
    """
    return _right_in(folder) or _networks_within(folder)


def _right_in(folder: Path) -> list[Path]:
    indexes = [file for file in folder.glob(f"*{INDEX_SUFFIX}") if file.name[0] != "."]
    shards = {shard for index in indexes for shard in parse_index(index).values()}
    whole = (
        file
        for file in folder.iterdir()
        if is_weights_name(file.name) and file not in indexes and file.name[0] != "."
        if file.is_file() or _is_dead(file)
    )
    found = [*indexes, *(file for file in whole if file not in shards)]
    found = in_training_order(found, lambda file: weights_stem(file.name))
    for file in found:
        if _is_dead(file):
            raise CheckpointError(f"{file}: a link to nothing, expected its file to be there")
        if is_shard_name(file.name):
            lacks = f"{indexes[0].name} to name it" if indexes else f"its index ({INDEX_NAME})"
            raise CheckpointError(f"{file}: a shard of a model, expected {lacks}")
    return found


def _is_dead(file: Path) -> bool:
    return file.is_symlink() and not file.exists()


def _networks_within(folder: Path) -> list[Path]:
    inner = [item for item in folder.iterdir() if SAVED.fullmatch(item.name) and item.is_dir()]
    saved = sorted(inner, key=lambda item: natural_key(item.name))
    found = []
    for home in saved or [folder]:
        parts = [home / name for name in PARTS if (home / name).is_dir()]
        found += [file for place in parts or (saved and [home]) for file in _right_in(place)]
    usual = [file for file in found if file.name in (*SHARED, *PLAIN)]
    one_each = len(found) == len(saved) and len({file.name for file in found}) == 1
    return found if not usual and one_each else usual


def instead_of_weights(folder: Path) -> str:
    """For the refusal of a folder without weights: what makes some, or where some are; or ""."""
    if files := convertible(folder):
        kinds = ", ".join(sorted({file.suffix.lower() for file in files}))
        return f"; `mergerl convert` makes them from the {len(files)} {kinds} files there"
    for wanted, told in (
        (is_weights_name, "; some lie in {}: name the folder that is meant"),
        (is_convertible, "; `mergerl convert` makes them from what lies in {}"),
    ):
        if within := {file.parent.name for file in folder.glob("*/*") if wanted(file.name)}:
            return told.format(", ".join(sorted(within, key=natural_key)[:4]))
    return ""


def index_of(file: Path) -> Path | None:
    """The index beside a file that says it is a shard of a model; None for any other file."""
    indexes = file.parent.glob(f"*{INDEX_SUFFIX}") if is_shard_name(file.name) else ()
    return next((index for index in indexes if file in parse_index(index).values()), None)


def open_weights(path: Path) -> StoredWeights:
    """Headers of a `.safetensors`, or of the shards of an index; CheckpointError if damaged.

    Raises CheckpointError too where an index and its shards disagree.
    """
    if not path.name.endswith(INDEX_SUFFIX):
        header = read_header(path)
        homes = dict.fromkeys(header.tensors, path)
        return StoredWeights(
            path=path, parts={path: header}, homes=homes, tensors=header.tensors,
            metadata=header.metadata,
        )  # fmt: skip
    homes = parse_index(path)
    parts = {file: read_header(file) for file in sorted(set(homes.values()))}
    found: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for file, header in parts.items():
        metadata |= header.metadata
        for name, info in header.tensors.items():
            if homes.get(name) != file:
                raise CheckpointError(
                    f"{file}: holds tensor {name!r}, which the index does not say"
                )
            found[name] = info
    for name, file in homes.items():
        if name not in found:
            raise CheckpointError(f"{file}: expected tensor {name!r}, as the index says")
    # The index keeps the order of the whole model, the shards only their own.
    tensors = {name: found[name] for name in homes}
    return StoredWeights(path=path, parts=parts, homes=homes, tensors=tensors, metadata=metadata)


def hash_weights(path: Path) -> str:
    """`StoredWeights.sha256` of a file or index, without a look at what it holds."""
    whole = not path.name.endswith(INDEX_SUFFIX)
    files = [path] if whole else sorted(set(parse_index(path).values()))
    return _joined([sha256_file(file) for file in files])


def _joined(digests: list[str]) -> str:
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()
