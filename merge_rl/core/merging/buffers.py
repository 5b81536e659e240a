"""Checkpoints as flat buffers, and their weighted sums."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from merge_rl.core.merging.groups import Groups
from merge_rl.core.merging.weighted_sum import weighted_sum
from merge_rl.errors import ConfigError


@dataclass(frozen=True)
class FlatLayout:
    """Where each merged tensor lies in a flat buffer of `size` elements.

    Tensors of one group are neighbours, so that a row of coefficients applies to one slice.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    group_bounds: tuple[int, ...]  # (G + 1,): group g is [bounds[g], bounds[g + 1])

    @property
    def size(self) -> int:
        """Elements of the whole buffer."""
        return self.group_bounds[-1]

    @property
    def num_groups(self) -> int:
        """Groups of tensors with coefficients of their own."""
        return len(self.group_bounds) - 1

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]], groups: Groups | None = None) -> FlatLayout:
        """Lay out the named tensors, group by group, in the given order within a group."""
        names = list(shapes)
        index = groups.index if groups else (0,) * len(names)
        if len(index) != len(names):
            raise ConfigError(f"expected a group for {len(names)} tensors, got {len(index)}")
        count = len(groups.names) if groups else 1
        ordered = [
            name for g in range(count) for name, i in zip(names, index, strict=True) if i == g
        ]
        sizes = {name: math.prod(shapes[name]) for name in names}
        offsets, total = [], 0
        for name in ordered:
            offsets.append(total)
            total += sizes[name]
        bounds = [0] * (count + 1)
        for name, g in zip(names, index, strict=True):
            bounds[g + 1] += sizes[name]
        for g in range(count):
            bounds[g + 1] += bounds[g]
        forms = tuple(tuple(shapes[name]) for name in ordered)
        return cls(tuple(ordered), forms, tuple(offsets), tuple(bounds))

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Each tensor as a view into the flat buffer (size,)."""
        return {
            name: flat[offset : offset + math.prod(shape)].view(shape)
            for name, shape, offset in zip(self.names, self.shapes, self.offsets, strict=True)
        }


class Piece(NamedTuple):
    """Elements [start, stop) of the flat buffer, of one group, in each of the K checkpoints."""

    start: int
    stop: int
    group: int
    sources: Sequence[Tensor]


class Checkpoints(ABC):
    """Checkpoints of a set, ready to be merged many times, wherever their values lie.

    `fixed` holds the tensors that are carried from the base checkpoint, not averaged.
    """

    def __init__(self, layout: FlatLayout, fixed: Mapping[str, Tensor]) -> None:
        self.layout, self.fixed = layout, dict(fixed)

    @property
    @abstractmethod
    def num_checkpoints(self) -> int:
        """K."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the values lie."""

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """The whole buffer in pieces that lie together in every checkpoint."""

    def blocks(self, size: int) -> Iterator[Piece]:
        """The pieces cut where a tensor starts, and after every `size` elements of it.

        The same blocks from every kind of storage: what is summed over each of them, and then over
        all in order, rounds alike wherever the values lie.
        """
        offsets = self.layout.offsets
        for start, stop, group, sources in self.pieces():
            inside = offsets[bisect_left(offsets, start) : bisect_left(offsets, stop)]
            for first, end in pairwise([*inside, stop]):
                for begin in range(first, end, size):
                    part = slice(begin - start, min(begin + size, end) - start)
                    yield Piece(begin, start + part.stop, group, [s[part] for s in sources])

    def merge(self, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
        """Merged parameters (size,) float32: theta_g = sum_k coefficients[g, k] theta_{g,k}.

        Args:
            coefficients: (G, K) or, for one group, (K,); any floating dtype, used as float32.
            out: where to write; may be the buffer a live model's parameters are views of, and may
                lie on another device than the checkpoints.

        Sums are as `weighted_sum` makes them: the same bits from every kind of storage.
        """
        rows = coefficients.to("cpu", torch.float32)
        rows = rows.reshape(1, -1) if rows.ndim == 1 else rows
        expected = (self.layout.num_groups, self.num_checkpoints)
        if tuple(rows.shape) != expected:
            raise ConfigError(f"expected coefficients {expected}, got {tuple(rows.shape)}")
        if out is None:
            out = torch.empty(self.layout.size, device=self.device)
        for start, stop, group, sources in self.pieces():
            weighted_sum(sources, rows[group], out[start:stop])
        return out

    def weights(self, coefficients: Tensor) -> dict[str, Tensor]:
        """The whole merged state dict in float32, carried tensors included."""
        merged = self.layout.views(self.merge(coefficients))
        carried = {name: as_float32(tensor) for name, tensor in self.fixed.items()}
        return {**merged, **carried}


class FlatCheckpoints(Checkpoints):
    """Checkpoints as the rows of one matrix (K, size), in their storage dtype.

    A merge reads the matrix once: K x size x itemsize bytes, the floor of its time.
    """

    def __init__(self, layout: FlatLayout, matrix: Tensor, fixed: Mapping[str, Tensor]) -> None:
        super().__init__(layout, fixed)
        if matrix.ndim != 2 or matrix.shape[1] != layout.size:
            raise ConfigError(
                f"expected a matrix of {layout.size} columns, got shape {tuple(matrix.shape)}"
            )
        self.matrix = matrix

    @classmethod
    def load(
        cls,
        read: Callable[[int], Mapping[str, Tensor]],
        count: int,
        layout: FlatLayout,
        *,
        base: int,
        fixed: Iterable[str],
        device: torch.device | None = None,
        pinned: bool = False,
    ) -> FlatCheckpoints:
        """Read `count` checkpoints, each once, onto a device (the CPU if None).

        Where tensors of different dtypes are merged, the buffer is float32. `pinned` memory of the
        CPU is sent to a GPU several times as fast; where the system grants none, it is not.
        """
        matrix, carried = torch.empty(0), {}
        for index in range(count):
            weights = read(index)
            if index == 0:
                dtypes = {weights[name].dtype for name in layout.names}
                dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
                matrix = _buffer((count, layout.size), dtype, device, pinned=pinned)
            for name, view in layout.views(matrix[index]).items():
                view.copy_(weights[name])
            if index == base:
                carried = {name: weights[name].clone() for name in fixed}
        return cls(layout, matrix, carried)

    @property
    def num_checkpoints(self) -> int:
        """Number of checkpoints K."""
        return len(self.matrix)

    @property
    def device(self) -> torch.device:
        """Where the buffers lie."""
        return self.matrix.device

    def pieces(self) -> Iterator[Piece]:
        """One piece a group."""
        bounds = self.layout.group_bounds
        for group, (start, stop) in enumerate(pairwise(bounds)):
            yield Piece(start, stop, group, self.matrix[:, start:stop].unbind(0))


class MappedCheckpoints(Checkpoints):
    """Checkpoints whose tensors stay where they are: views of files mapped into memory.

    What is not in memory is read from disk at every merge.
    """

    def __init__(
        self,
        layout: FlatLayout,
        rows: Sequence[Mapping[str, Tensor]],
        fixed: Mapping[str, Tensor],
    ) -> None:
        super().__init__(layout, fixed)
        self._flat = {name: [row[name].reshape(-1) for row in rows] for name in layout.names}
        self._count = len(rows)

    @property
    def num_checkpoints(self) -> int:
        """Number of checkpoints K."""
        return self._count

    @property
    def device(self) -> torch.device:
        """The CPU: files are mapped there."""
        return torch.device("cpu")

    def pieces(self) -> Iterator[Piece]:
        """One piece a tensor."""
        layout, group = self.layout, 0
        for name, start in zip(layout.names, layout.offsets, strict=True):
            sources = self._flat[name]
            while group + 1 < layout.num_groups and start >= layout.group_bounds[group + 1]:
                group += 1
            yield Piece(start, start + sources[0].numel(), group, sources)


def _buffer(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device | None, *, pinned: bool
) -> Tensor:
    if pinned:
        with suppress(RuntimeError):  # more than may be pinned here
            return torch.empty(shape, dtype=dtype, pin_memory=True)
    return torch.empty(shape, dtype=dtype, device=device)


def as_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32 if it is of a floating type, else itself."""
    return tensor.float() if tensor.is_floating_point() else tensor
