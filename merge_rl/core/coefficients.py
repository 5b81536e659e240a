"""Maps from the search vector theta (D,) to merging coefficients (G, K).

K checkpoints are merged as sum_k coefficients[g, k] · weights_k, with one row g for each group of
tensors (a single group by default). A searcher works on theta, unit-scaled and unconstrained;
`scale` turns a unit of theta into a change of coefficients, and theta = 0 is the starting point.
All maps return float64. A theta that holds NaN gives NaN coefficients: a failed candidate is data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from merge_rl.core.curved_maps import EmaMap, SoftmaxMap
from merge_rl.core.linear_maps import AffineMap, FreeMap, WhitenedMap
from merge_rl.core.map_parts import check_base
from merge_rl.errors import ConfigError, UnknownNameError

__all__ = [
    "MAPS", "AffineMap", "BoundedMap", "CoefficientMap", "EmaMap", "FreeMap", "SoftmaxMap",
    "WhitenedMap", "initial_coefficients", "make_map",
]  # fmt: skip

MAPS = ("whitened", "affine", "free", "softmax", "ema")


class CoefficientMap(Protocol):
    """theta (D,) -> coefficients (G, K) float64; theta = 0 gives the starting coefficients."""

    @property
    def kind(self) -> str: ...
    @property
    def num_checkpoints(self) -> int: ...
    @property
    def num_groups(self) -> int: ...
    @property
    def dim(self) -> int: ...
    def __call__(self, theta: Tensor) -> Tensor: ...
    def theta_of(self, coefficients: Tensor) -> Tensor:
        """The theta (D,) that gives coefficients (G, K); ConfigError where none does."""
        ...


@dataclass(frozen=True, eq=False)
class BoundedMap:
    """Another map, held inside a box: no coefficient beyond ± `limit`.

    A row that would leave the box is drawn back towards the start, on the straight line to it, as
    far as it takes: c = start + t (c - start) with the largest t <= 1 that fits. Sums that the
    other map keeps are kept, and theta = 0 is left alone.
    """

    inner: CoefficientMap
    limit: float

    def __post_init__(self) -> None:
        largest = float(self.inner(torch.zeros(self.dim, dtype=torch.float64)).abs().max())
        if not largest <= self.limit:
            raise ConfigError(
                f"the start has a coefficient of {largest:g}, "
                f"expected a bound of at least that, got {self.limit:g}"
            )

    @property
    def kind(self) -> str:
        return self.inner.kind

    @property
    def num_checkpoints(self) -> int:
        return self.inner.num_checkpoints

    @property
    def num_groups(self) -> int:
        return self.inner.num_groups

    @property
    def dim(self) -> int:
        return self.inner.dim

    def __call__(self, theta: Tensor) -> Tensor:
        start = self.inner(torch.zeros_like(theta))
        moves = self.inner(theta) - start
        # How far each coefficient may go in the direction it takes.
        room = (self.limit - start * moves.sign()) / moves.abs()
        share = torch.where(moves == 0, torch.inf, room).amin(1, keepdim=True).clamp(max=1)
        return start + share * moves

    def theta_of(self, coefficients: Tensor) -> Tensor:
        """The inverse; ConfigError for coefficients outside the box."""
        largest = float(coefficients.abs().max())
        if largest > self.limit + 1e-9:
            raise ConfigError(f"expected coefficients within {self.limit:g}, got {largest:g}")
        return self.inner.theta_of(coefficients)


def initial_coefficients(start: str, *, num_checkpoints: int, base: int) -> Tensor:
    """Where a search begins, (K,) float64: "newest" is all of `base`, "uniform" the average."""
    check_base(base, num_checkpoints)
    if start == "newest":
        return torch.eye(num_checkpoints, dtype=torch.float64)[base].clone()
    if start == "uniform":
        return torch.full((num_checkpoints,), 1 / num_checkpoints, dtype=torch.float64)
    raise UnknownNameError("starting point", start, known=("newest", "uniform"))


def make_map(
    kind: str,
    *,
    num_checkpoints: int,
    num_groups: int = 1,
    base: int,
    scale: float,
    init: Tensor,
    nimg: Sequence[int] | Tensor | None = None,
    ema_std: Sequence[float | None] | Tensor | None = None,
    gram: Tensor | None = None,
) -> CoefficientMap:
    """The map of that kind, one of `MAPS`: "ema" needs `nimg` and `ema_std`, "whitened" `gram`.

    `init` (K,) is what theta = 0 gives. The ema map can only start at a checkpoint, so its `init`
    must be 1 at `base` and 0 elsewhere.
    """
    if tuple(init.shape) != (num_checkpoints,):
        expected = f"({num_checkpoints},)"
        raise ConfigError(f"expected init of shape {expected}, got {tuple(init.shape)}")
    if kind == "affine":
        return AffineMap(init=init, scale=scale, num_groups=num_groups, base=base)
    if kind == "free":
        return FreeMap(init=init, scale=scale, num_groups=num_groups)
    if kind == "softmax":
        return SoftmaxMap(init=init, scale=scale, num_groups=num_groups)
    if kind == "whitened":
        if gram is None:
            raise ConfigError("the whitened map needs the Gram matrix of the checkpoints")
        return WhitenedMap(init=init, scale=scale, num_groups=num_groups, gram=gram)
    if kind != "ema":
        raise UnknownNameError("coefficient map", kind, MAPS)
    alone = initial_coefficients("newest", num_checkpoints=num_checkpoints, base=base)
    if not torch.equal(init.to(alone), alone):
        got = init.tolist()
        raise ConfigError(f"expected the ema map to start at checkpoint {base} alone, got {got}")
    times = _known("nimg", nimg, num_checkpoints)
    widths = _known("ema_std", ema_std, num_checkpoints)
    return EmaMap(nimg=times, ema_std=widths, base=base, scale=scale, num_groups=num_groups)


def _known(name: str, values: Sequence[float | None] | Tensor | None, length: int) -> Tensor:
    listed = [None] * length if values is None else list(values)
    missing = [i for i, value in enumerate(listed) if value is None]
    if missing or len(listed) != length:
        raise ConfigError(
            f"expected {name} of all {length} checkpoints for the ema map,"
            f" got {len(listed) - len(missing)} of them"
        )
    return torch.tensor(
        [float(value) for value in listed if value is not None], dtype=torch.float64
    )
