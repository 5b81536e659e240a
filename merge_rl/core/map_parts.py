"""What the maps from theta to coefficients share: settings, checked once, and shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from merge_rl.errors import ConfigError


@dataclass(frozen=True, eq=False, kw_only=True)
class ShiftedInit:
    """What the maps around an `init` (K,) share: settings, checked once, and sizes."""

    init: Tensor
    scale: float
    num_groups: int = 1

    def __post_init__(self) -> None:
        if self.init.ndim != 1 or not bool(self.init.isfinite().all()):
            raise ConfigError(f"expected finite init coefficients (K,), got {self.init.tolist()}")
        check_sizes(self.num_checkpoints, self.num_groups, self.scale)
        object.__setattr__(self, "init", self.init.to(torch.float64))

    @property
    def num_checkpoints(self) -> int:
        return self.init.numel()

    @property
    def dim(self) -> int:
        return self.num_groups * self.num_checkpoints


def theta_rows(theta: Tensor, num_groups: int, dim: int) -> Tensor:
    """theta (D,) as rows (G, D / G) float64; ConfigError for another shape."""
    if tuple(theta.shape) != (dim,):
        raise ConfigError(f"expected theta of shape ({dim},), got {tuple(theta.shape)}")
    return theta.to(torch.float64).reshape(num_groups, -1)


def moves_from(coefficients: Tensor, init: Tensor, num_groups: int) -> Tensor:
    """Coefficients (G, K) minus `init` (K,), float64; ConfigError for another shape."""
    expected = (num_groups, init.numel())
    if tuple(coefficients.shape) != expected:
        raise ConfigError(f"expected coefficients {expected}, got {tuple(coefficients.shape)}")
    return coefficients.to(torch.float64) - init


def level_moves(coefficients: Tensor, init: Tensor, num_groups: int, kind: str) -> Tensor:
    """The same, where every row keeps the sum of `init`, to 1e-6; else ConfigError."""
    moves = moves_from(coefficients, init, num_groups)
    if float(moves.sum(1).abs().max()) > 1e-6:
        total, sums = float(init.sum()), coefficients.sum(1).tolist()
        raise ConfigError(f"the {kind} map keeps the sum {total:g} of a row, got {sums}")
    return moves


def check_base(base: int, num_checkpoints: int) -> None:
    """ConfigError unless `base` is the index of a checkpoint."""
    if not 0 <= base < num_checkpoints:
        raise ConfigError(f"expected base in 0..{num_checkpoints - 1}, got {base}")


def check_sizes(num_checkpoints: int, num_groups: int, scale: float) -> None:
    """ConfigError unless there are checkpoints, groups and a scale above 0."""
    if num_checkpoints < 1 or num_groups < 1:
        got = f"{num_checkpoints} checkpoints and {num_groups} groups"
        raise ConfigError(f"expected at least one checkpoint and one group, got {got}")
    if not 0 < scale < float("inf"):
        raise ConfigError(f"expected a finite scale > 0, got {scale}")
