"""Checkpoints of torch.distributed: tensors in pieces over many files, read as data.

torch's own reader unpickles `.metadata` and every piece. Here both are read as pickles of all files
are: nothing in them is looked up or called.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

from merge_rl.config import whole_number
from merge_rl.errors import CheckpointError
from merge_rl.late import torch
from merge_rl.storage.pickles import (
    Alike,
    ByteSource,
    Record,
    Span,
    StorageRef,
    TensorRef,
    read_data,
    read_pickle,
    row_major,
    shown,
)

_OPTIMIZER: Final = re.compile(r"(?:optim(?:izers?)?|opt_state)(?:_[0-9]+)?\.")
# What holds network and optimizer as one object, `app` in torch's own recipe.
_HOLDER: Final = re.compile(rf"([^.]+)\.{_OPTIMIZER.pattern}(?:state|param_groups)\.")
_MOST_PARTS: Final = 1024  # of a tensor that is cut along several axes
_Place = tuple[str, int, int]  # file, offset, length


class PiecedRef(TensorRef):
    """A tensor whose parts lie at several places: (offsets, part) each, which cover it."""

    __slots__ = ("parts",)

    def __init__(
        self, shape: tuple[int, ...], parts: list[tuple[tuple[int, ...], TensorRef]]
    ) -> None:
        code = parts[0][1].storage.code
        storage = StorageRef(code, math.prod(shape))
        super().__init__(storage, 0, shape, tuple(row_major(shape)))
        self.parts = parts

    def pieces(self, size: int) -> Iterator[bytes]:
        """The elements' bytes in row-major order; those cut along the first axis as they lie."""
        rows = sorted(self.parts, key=lambda part: part[0])
        if all(part.shape[1:] == self.shape[1:] for _, part in rows):
            return itertools.chain.from_iterable(part.pieces(size) for _, part in rows)
        data = self.load().reshape(-1).view(torch.uint8).numpy().data
        return (bytes(data[i : i + size]) for i in range(0, len(data), size))

    def load(self) -> torch.Tensor:
        """The tensor in memory."""
        whole = torch.empty(self.shape, dtype=self.info.dtype)
        for offsets, part in self.parts:
            place = tuple(slice(o, o + n) for o, n in zip(offsets, part.shape, strict=True))
            whole[place] = part.load()
        return whole


def files_of_metadata(metadata: Path) -> list[Path]:
    """The files of a checkpoint, its .metadata first."""
    return [metadata, *sorted(metadata.parent.glob("*.distcp"))]


def read_distcp(metadata: Path) -> dict[str, TensorRef]:
    """Name -> tensor of a checkpoint folder's `.metadata`, but those of optimizers.

    Raises CheckpointError for a checkpoint whose parts are missing, lie elsewhere, or do not cover
    a tensor.
    """
    described, stored = _tables(metadata)
    pieces = _Pieces(metadata)
    found: dict[str, TensorRef] = {}
    holders = {f"{match[1]}." for match in map(_HOLDER.match, described) if match}
    for name, record in described.items():
        first = name.partition(".")[0] + "."
        own = name.removeprefix(first) if first in holders else name
        sizes = _field(record, "size")
        if sizes is None or _OPTIMIZER.match(own):
            continue  # plain objects: counts, options, settings
        shape = _whole(sizes, metadata, name)
        parts = [(offsets, pieces.read(place, name)) for offsets, place in stored.get(name, [])]
        _require_cover(metadata, name, shape, parts)
        alone = len(parts) == 1 and parts[0][1].shape == shape
        found[own] = parts[0][1] if alone else PiecedRef(shape, parts)
    if not found:
        raise CheckpointError(
            f"{metadata.parent}: holds the state of an optimizer or none, and no weights"
        )
    return found


def _tables(
    metadata: Path,
) -> tuple[dict[str, Record], dict[str, list[tuple[tuple[int, ...], _Place]]]]:
    """(name -> its description, name -> offsets and place of each part)."""
    data = read_pickle(metadata)
    described, storage = _field(data, "state_dict_metadata"), _field(data, "storage_data")
    if not isinstance(described, dict) or not isinstance(storage, dict):
        raise CheckpointError(
            f"{metadata}: not the description of a checkpoint by torch.distributed"
        )
    stored: dict[str, list[tuple[tuple[int, ...], _Place]]] = {}
    for key, info in storage.items():
        name, offset = _field(key, "fqn"), _field(key, "offset")
        file = _field(info, "relative_path")
        numbers = tuple(_field(info, part) for part in ("offset", "length"))
        if not isinstance(name, str) or not isinstance(file, str):
            raise CheckpointError(f"{metadata}: a part without name or file")
        if _field(info, "transform_descriptors"):
            raise CheckpointError(f"{metadata}: parts are transformed (compressed or encrypted)")
        begin, length = _whole(numbers, metadata, name)
        where = () if offset is None else _whole(offset, metadata, name)
        stored.setdefault(name, []).append((where, (file, begin, length)))
    named = {n: r for n, r in described.items() if isinstance(n, str) and isinstance(r, Record)}
    return named, stored


class _Pieces:
    """Reads the archives that the parts of a checkpoint's tensors are, each once."""

    def __init__(self, metadata: Path) -> None:
        self._metadata = metadata
        self._sources: dict[str, ByteSource] = {}
        self._alike: Alike = {}

    def read(self, place: _Place, name: str) -> TensorRef:
        """The part of tensor `name` at a place, which is one of the folder's own files."""
        file, offset, length = place
        if PurePosixPath(file).name != file or "\\" in file:
            raise CheckpointError(
                f"{self._metadata}: {shown(name)} lies in {shown(file)}, outside its folder"
            )
        path = self._metadata.parent / file
        if file not in self._sources:
            self._sources[file] = ByteSource(path)
        found = read_data(Span(self._sources[file], offset, length), alike=self._alike)
        if not isinstance(found, TensorRef):
            raise CheckpointError(f"{path}: {shown(name)} is no tensor")
        return found


def _require_cover(
    metadata: Path,
    name: str,
    shape: tuple[int, ...],
    parts: list[tuple[tuple[int, ...], TensorRef]],
) -> None:
    """Refuse parts that lie outside, overlap, or leave something open."""
    boxes = [(offsets or (0,) * len(shape), part.shape) for offsets, part in parts]
    inside = all(
        len(o) == len(n) == len(shape)
        and all(a + b <= limit for a, b, limit in zip(o, n, shape, strict=True))
        for o, n in boxes
    )
    apart = inside and _apart([box for box in boxes if math.prod(box[1])], shape)
    full = sum(math.prod(part.shape) for _, part in parts) == math.prod(shape)
    alike = len({part.storage.code for _, part in parts}) == 1
    if not (inside and full and apart and alike):
        raise CheckpointError(
            f"{metadata}: the {len(parts)} parts of {shown(name)} do not cover a tensor of shape "
            f"{list(shape)}; expected all files of the checkpoint"
        )


def _apart(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]], shape: tuple[int, ...]) -> bool:
    """Whether boxes (offsets, sizes) within a shape have no element in common."""
    if all(sizes[1:] == shape[1:] for _, sizes in boxes):  # rows, as they are mostly cut
        rows = sorted((offsets[:1], sizes[:1]) for offsets, sizes in boxes)
        pairs = itertools.pairwise(rows)
        return all(sum(o) + sum(n) <= sum(p) and bool(o) for (o, n), (p, _) in pairs)
    return len(boxes) <= _MOST_PARTS and all(
        any(a + n <= b or b + m <= a for a, n, b, m in zip(o, s, p, t, strict=True))
        for (o, s), (p, t) in itertools.combinations(boxes, 2)
    )


def _field(record: object, name: str) -> object:
    state = record.state if isinstance(record, Record) else None
    return state.get(name) if isinstance(state, Mapping) else None


def _whole(value: object, metadata: Path, name: str) -> tuple[int, ...]:
    sizes = value if isinstance(value, tuple) else (None,)
    if not all(type(n) is int and n >= 0 for n in sizes) or len(sizes) > 32:
        raise CheckpointError(f"{metadata}: {shown(name)} has no place or shape of whole numbers")
    return tuple(int(str(n)) for n in sizes)


def read_sharded(folder: Path, metadata: Path) -> tuple[dict[str, Any], int | None]:
    """(the tensors with the settings beside them, the steps), these as Lightning's meta.pt says."""
    file = folder / "meta.pt"
    found = read_data(file) if file.is_file() else {}
    meta = found if isinstance(found, dict) else {}
    said = {key: meta[key] for key in ("hyper_parameters", "loops") if key in meta}
    return {**said, **read_distcp(metadata)}, whole_number(meta.get("global_step"))
