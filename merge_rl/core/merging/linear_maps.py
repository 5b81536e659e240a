"""Maps that move the coefficients in proportion to theta: affine, PCA, whitened, free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from merge_rl.core.merging.buffers import Checkpoints
from merge_rl.errors import ConfigError

CAP = 0.5  # largest coefficient that a unit of theta moves in the whitened map


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
        """Number of checkpoints K."""
        return self.init.numel()

    @property
    def dim(self) -> int:
        """Length of theta."""
        return self.num_groups * self.num_checkpoints


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
        """Length of theta."""
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
        if not bool(self.gram.any()):
            raise ConfigError(f"the {self.kind} map needs weights that are not all 0")
        bases = [whitened_basis(gram, self.scale, CAP) for gram in self.gram]
        object.__setattr__(self, "_bases", torch.stack(bases))

    @property
    def bases(self) -> Tensor:
        """B of every group, (G, K, K-1)."""
        found: Tensor = self._bases  # type: ignore[attr-defined]
        return found

    @property
    def dim(self) -> int:
        """Length of theta."""
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


_CHUNK = 1 << 20  # elements of each checkpoint held in float64 at a time


def weight_gram(checkpoints: Checkpoints, device: torch.device | None = None) -> Tensor:
    """Inner products of the checkpoints' merged parameters: (G, K, K) float64 on the CPU.

        gram[g, i, j] = sum over the elements of group g of weights_i weights_j

    One pass over the weights, on `device` (where they lie if None), in float64 where it has it.
    The same bits from every kind of storage: products of fixed blocks, in fixed order, each of
    a fresh copy, since libraries choose the order of a sum by where its operands start.
    """
    count, device = checkpoints.num_checkpoints, device or checkpoints.device
    gram = torch.zeros(checkpoints.layout.num_groups, count, count, dtype=torch.float64)
    wide = torch.float32 if device.type == "mps" else torch.float64
    for _, _, group, sources in checkpoints.blocks(_CHUNK):
        rows = torch.stack(list(sources)).to(device).to(wide)
        gram[group] += (rows @ rows.T).to("cpu", torch.float64)
    return gram


def whitened_basis(gram: Tensor, reach: float, cap: float) -> Tensor:
    """Moves of the coefficients, as columns of B (K, K-1), that change the weights alike.

    With C = I - 1/K, the moves whose sum is 0, and C gram C / s = V diag(λ) Vᵀ, where s is the
    mean squared norm of a checkpoint (1 where weights are all 0, as a group's may be):

        B = V diag(reach / √(λ + ρ)),  ρ = (reach / cap)²

    A unit step along a column changes the weights by `reach` times their norm, or by less where
    checkpoints are so alike that this would take coefficients beyond `cap`: no entry of B exceeds
    `cap`. Columns sum to 0 and come in order of λ, smallest first; each one's largest entry is
    positive, so that no linear algebra library chooses the sign.

    Args:
        gram: (K, K) float64, K >= 2.
        reach: relative change of the weights, > 0.
        cap: largest coefficient of a unit step, > 0.

    Raises ConfigError for a Gram matrix that is not finite.
    """
    count = len(gram)
    if count < 2:
        raise ConfigError("expected at least 2 checkpoints for the whitened map, got 1")
    if not bool(gram.isfinite().all()):
        raise ConfigError("the whitened map needs finite weights")
    size = float(gram.diagonal().mean()) or 1.0
    # An orthonormal basis of the moves whose sum is 0 keeps the direction (1, ..., 1) out.
    eye = torch.eye(count, dtype=torch.float64)
    moves = torch.linalg.qr(eye[:, 1:] - 1 / count).Q
    values, vectors = torch.linalg.eigh(moves.T @ (gram / size) @ moves)
    basis = moves @ vectors
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    basis = basis * largest.sign()
    scaled: Tensor = basis * (reach / (values.clamp(min=0) + (reach / cap) ** 2).sqrt())
    return scaled
