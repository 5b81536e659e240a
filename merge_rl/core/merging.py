"""Weighted sums of checkpoints over flat buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from merge_rl.core.groups import Groups
from merge_rl.errors import ConfigError

CHUNK = 1 << 18  # elements merged at a time: a float32 chunk of 8 checkpoints fits the L2 cache


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


class FlatCheckpoints:
    """All checkpoints of a set as the rows of one matrix (K, size), in their storage dtype.

    A merge reads the matrix once: K x size x itemsize bytes, the floor of its time. `fixed` holds
    the tensors that are carried from the base checkpoint, not averaged.
    """

    def __init__(self, layout: FlatLayout, matrix: Tensor, fixed: Mapping[str, Tensor]) -> None:
        if matrix.ndim != 2 or matrix.shape[1] != layout.size:
            raise ConfigError(
                f"expected a matrix of {layout.size} columns, got shape {tuple(matrix.shape)}"
            )
        self.layout, self.matrix, self.fixed = layout, matrix, dict(fixed)

    @classmethod
    def load(
        cls,
        read: Callable[[int], Mapping[str, Tensor]],
        count: int,
        layout: FlatLayout,
        *,
        base: int,
        fixed: Iterable[str],
    ) -> FlatCheckpoints:
        """Read `count` checkpoints, each once; they must share one dtype per merged tensor.

        Where tensors of different dtypes are merged, the buffer is float32.
        """
        matrix, carried = torch.empty(0), {}
        for index in range(count):
            weights = read(index)
            if index == 0:
                dtypes = {weights[name].dtype for name in layout.names}
                dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
                matrix = torch.empty(count, layout.size, dtype=dtype)
            for name, view in layout.views(matrix[index]).items():
                view.copy_(weights[name])
            if index == base:
                carried = {name: weights[name].clone() for name in fixed}
        return cls(layout, matrix, carried)

    @property
    def num_checkpoints(self) -> int:
        """K, the rows of the matrix."""
        return len(self.matrix)

    def to(self, device: torch.device) -> FlatCheckpoints:
        """The same checkpoints with their matrix on `device`; itself where it is there already."""
        if self.matrix.device == device:
            return self
        return FlatCheckpoints(self.layout, self.matrix.to(device), self.fixed)

    def merge(self, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
        """Merged parameters (size,) float32: theta_g = sum_k coefficients[g, k] theta_{g,k}.

        Args:
            coefficients: (G, K) or, for one group, (K,); any floating dtype, used as float32.
            out: where to write; may be the buffer a live model's parameters are views of.

        Sums are accumulated in float32 whatever the storage dtype, in the order of checkpoints.
        """
        rows = coefficients.to(self.matrix.device, torch.float32)
        rows = rows.reshape(1, -1) if rows.ndim == 1 else rows
        expected = (self.layout.num_groups, self.num_checkpoints)
        if tuple(rows.shape) != expected:
            raise ConfigError(f"expected coefficients {expected}, got {tuple(rows.shape)}")
        if out is None:
            out = torch.empty(self.layout.size, device=self.matrix.device)
        bounds = self.layout.group_bounds
        for row, begin, end in zip(rows, bounds[:-1], bounds[1:], strict=True):
            for start in range(begin, end, CHUNK):
                stop = min(start + CHUNK, end)
                torch.mv(self.matrix[:, start:stop].float().T, row, out=out[start:stop])
        return out

    def weights(self, coefficients: Tensor) -> dict[str, Tensor]:
        """The whole merged state dict in float32, carried tensors included."""
        merged = self.layout.views(self.merge(coefficients))
        carried = {name: _as_float32(tensor) for name, tensor in self.fixed.items()}
        return {**merged, **carried}


class LiveModel:
    """A network whose parameters are views of one flat buffer, so that a merge writes in place.

    Merges are made on the network's device; the checkpoints are copied there if need be.
    """

    def __init__(self, model: nn.Module, checkpoints: FlatCheckpoints) -> None:
        state = model.state_dict()
        device = next((tensor.device for tensor in state.values()), checkpoints.matrix.device)
        self.model, self._checkpoints = model, checkpoints.to(device)
        self._flat = torch.empty(checkpoints.layout.size, device=device)
        views = checkpoints.layout.views(self._flat)
        expected = {name: tensor.shape for name, tensor in state.items()}
        found = {name: tensor.shape for name, tensor in {**views, **checkpoints.fixed}.items()}
        if expected != found:
            names = expected.keys() | found.keys()
            odd = sorted(name for name in names if expected.get(name) != found.get(name))
            raise ConfigError(
                f"the network and the checkpoints differ in {len(odd)} tensors, first {odd[0]!r}"
            )
        self._bind(views)

    def _bind(self, views: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, view in views.items():
                owner, leaf = self._owner(name)
                # A parameter made of a view shares its version counter: caches of derived weights
                # notice every merge.
                setattr(owner, leaf, nn.Parameter(view, requires_grad=False))
            for name, tensor in self._checkpoints.fixed.items():
                owner, leaf = self._owner(name)
                current = getattr(owner, leaf)
                value = _as_float32(tensor).to(self._flat.device)
                if isinstance(current, nn.Parameter):
                    setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
                else:
                    setattr(owner, leaf, value)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.model.get_submodule(path), leaf

    def set_coefficients(self, coefficients: Tensor) -> None:
        """Turn the network into the merge with these coefficients (G, K)."""
        with torch.no_grad():
            self._checkpoints.merge(coefficients, out=self._flat)


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
