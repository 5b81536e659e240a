"""Maps that move the coefficients in proportion to theta: affine, whitened, free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from merge_rl.core.map_parts import ShiftedInit, check_base, level_moves, moves_from, theta_rows
from merge_rl.core.whitening import whitened_basis
from merge_rl.errors import ConfigError

CAP = 0.5  # largest coefficient that a unit of theta moves in the whitened map


@dataclass(frozen=True, eq=False, kw_only=True)
class AffineMap(ShiftedInit):
    """init + scale · Σ_j theta_j (e_j − e_base) over j ≠ base: every row keeps the sum of `init`.

    Coefficients may be negative. theta holds K−1 numbers a group, in the order of the checkpoints
    without `base`: D = G (K−1).
    """

    base: int
    kind: ClassVar[str] = "affine"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_base(self.base, self.num_checkpoints)
        if self.num_checkpoints < 2:
            raise ConfigError("expected at least 2 checkpoints for the affine map, got 1")

    @property
    def dim(self) -> int:
        return self.num_groups * (self.num_checkpoints - 1)

    def __call__(self, theta: Tensor) -> Tensor:
        moves = self.scale * theta_rows(theta, self.num_groups, self.dim)
        before, after = moves[:, : self.base], moves[:, self.base :]
        return self.init + torch.cat([before, -moves.sum(1, keepdim=True), after], dim=1)

    def theta_of(self, coefficients: Tensor) -> Tensor:
        """The inverse: rows must have the sum of `init`, to 1e-6."""
        moves = level_moves(coefficients, self.init, self.num_groups, self.kind)
        others = torch.cat([moves[:, : self.base], moves[:, self.base + 1 :]], dim=1)
        return others.flatten() / self.scale


@dataclass(frozen=True, eq=False, kw_only=True)
class WhitenedMap(ShiftedInit):
    """init + B_g theta_g: the affine map in directions that change the weights alike.

    B_g (K, K-1) is `whitened_basis` of the group's Gram matrix, with `scale` as its reach: a unit
    of theta changes a group's weights by `scale` times their norm, or by less where that would
    take coefficients beyond `CAP`. Rows keep the sum of `init`. D = G (K-1).
    """

    gram: Tensor
    kind: ClassVar[str] = "whitened"

    def __post_init__(self) -> None:
        super().__post_init__()
        expected = (self.num_groups, self.num_checkpoints, self.num_checkpoints)
        if tuple(self.gram.shape) != expected:
            raise ConfigError(
                f"expected a Gram matrix {expected}, got shape {tuple(self.gram.shape)}"
            )
        bases = [whitened_basis(gram, self.scale, CAP) for gram in self.gram]
        object.__setattr__(self, "_bases", torch.stack(bases))

    @property
    def bases(self) -> Tensor:
        """B of every group, (G, K, K-1)."""
        found: Tensor = self._bases  # type: ignore[attr-defined]
        return found

    @property
    def dim(self) -> int:
        return self.num_groups * (self.num_checkpoints - 1)

    def __call__(self, theta: Tensor) -> Tensor:
        rows = theta_rows(theta, self.num_groups, self.dim)
        return self.init + (self.bases * rows[:, None, :]).sum(-1)

    def theta_of(self, coefficients: Tensor) -> Tensor:
        """The inverse: rows must have the sum of `init`, to 1e-6."""
        moves = level_moves(coefficients, self.init, self.num_groups, self.kind)
        # The columns of B are orthogonal.
        along = (self.bases * moves[:, :, None]).sum(1) / self.bases.square().sum(1)
        return along.flatten()


@dataclass(frozen=True, eq=False, kw_only=True)
class FreeMap(ShiftedInit):
    """init + scale · theta: no constraint, the sum may drift. D = G K."""

    kind: ClassVar[str] = "free"

    def __call__(self, theta: Tensor) -> Tensor:
        return self.init + self.scale * theta_rows(theta, self.num_groups, self.dim)

    def theta_of(self, coefficients: Tensor) -> Tensor:
        """The inverse."""
        return moves_from(coefficients, self.init, self.num_groups).flatten() / self.scale
