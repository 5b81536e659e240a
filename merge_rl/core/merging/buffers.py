"""Checkpoints as flat buffers, and their weighted sums, the same to the last bit everywhere."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from merge_rl.core.merging.groups import Groups
from merge_rl.errors import ConfigError

CHUNK = 1 << 18  # elements summed at a time: two float32 chunks of 1 MiB stay in the L2 cache
DEVICE_CHUNK = 1 << 24  # on an accelerator, where starting an operation costs more than memory


def weighted_sum(
    sources: Sequence[Tensor], coefficients: Sequence[float] | Tensor, out: Tensor
) -> Tensor:
    """out = sum_k coefficients[k] sources[k], in float32, in the order of k; returns `out`.

    Args:
        sources: K vectors (n,) of any real dtype and device, not altered. Float64 is rounded to
            float32 first; the narrower types are exact in it.
        coefficients: K numbers, rounded to float32. Where one is 0 its source is not read.
        out: (n,) float32, overwritten; shares no memory with the sources.

    Each product and each sum is rounded once, by itself: IEEE 754 then leaves no choice, and
    neither the processor, the number of threads nor where the sources lie changes a bit. (A matrix
    product may fuse and reorder; it is a quarter faster at most, as reading the sources dominates.)
    On a GPU one kernel makes the whole sum where Triton is there, see `fused_sum`.
    """
    terms = [(s, c) for s, c in zip(sources, float32(coefficients), strict=True) if c != 0]
    if not terms:
        return out.zero_()
    if out.is_cuda and _one_pass(out.device):
        from merge_rl.core.merging.fused_sum import sum_parts

        if sum_parts(terms, out):
            return out
    size = CHUNK if out.device.type == "cpu" else DEVICE_CHUNK
    term = torch.empty(min(size, out.numel()), device=out.device)
    for start in range(0, out.numel(), size):
        part = out[start : start + size]
        for k, (source, coefficient) in enumerate(terms):
            # In its own dtype: torch would convert before it sends, and send twice as much.
            given = source[start : start + size].to(out.device, non_blocking=True)
            add_product(part, given, coefficient, term, first=k == 0)
    return out


@functools.cache
def _one_pass(device: torch.device) -> bool:
    """Whether the kernel runs here: it needs Triton, a GPU that this knows, and a C compiler."""
    if find_spec("triton") is None:
        return False
    try:
        from merge_rl.core.merging.fused_sum import fused_sum

        found = torch.zeros(2, device=device)
        fused_sum([torch.ones(2, device=device)] * 2, [0.5, 2.0], found)
        return found.tolist() == [2.5, 2.5]
    except Exception:  # noqa: BLE001  (whatever is missing, the chain of operations needs none of it)
        return False


def add_product(
    out: Tensor, source: Tensor, coefficient: float, term: Tensor, *, first: bool
) -> None:
    """out += coefficient source, or out = coefficient source if it is the `first` of a sum.

    All (n,), `out` and `term` (at least (n,), overwritten) in float32; `coefficient` is a float32
    number. Two operations on purpose: one that multiplies and adds may round once or twice,
    depending on the machine.
    """
    target = out if first else term[: out.numel()]
    target.copy_(source).mul_(coefficient)
    if not first:
        out.add_(target)


def float32(coefficients: Sequence[float] | Tensor) -> list[float]:
    """The nearest float32 numbers."""
    values: list[float] = torch.as_tensor(coefficients, dtype=torch.float32).tolist()
    return values


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
