"""Maps from the search vector theta (D,) to merging coefficients (G, K).

K checkpoints are merged as sum_k coefficients[g, k] · weights_k, with one row g for each group of
tensors (a single group by default). A searcher works on theta, unit-scaled and unconstrained;
`scale` turns a unit of theta into a change of coefficients, and theta = 0 is the starting point.
All maps return float64. A theta that holds NaN gives NaN coefficients: a failed candidate is data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from merge_rl.core.ema_profiles import posthoc_coefficients
from merge_rl.errors import ConfigError, UnknownNameError

SMOOTHING = 0.1  # share of the uniform average mixed into a softmax start that has zeros
STD_RANGE = (0.001, 0.288)  # widths a search may reach, inside the open interval (0, 1/√12)


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


@dataclass(frozen=True, eq=False, kw_only=True)
class _ShiftedInit:
    """What the three maps around an `init` (K,) share: settings, checked once, and sizes."""

    init: Tensor
    scale: float
    num_groups: int = 1

    def __post_init__(self) -> None:
        if self.init.ndim != 1 or not bool(self.init.isfinite().all()):
            raise ConfigError(f"expected finite init coefficients (K,), got {self.init.tolist()}")
        _check_sizes(self.num_checkpoints, self.num_groups, self.scale)
        object.__setattr__(self, "init", self.init.to(torch.float64))

    @property
    def num_checkpoints(self) -> int:
        return self.init.numel()

    @property
    def dim(self) -> int:
        return self.num_groups * self.num_checkpoints


@dataclass(frozen=True, eq=False, kw_only=True)
class AffineMap(_ShiftedInit):
    """init + scale · Σ_j theta_j (e_j − e_base) over j ≠ base: every row keeps the sum of `init`.

    Coefficients may be negative. theta holds K−1 numbers a group, in the order of the checkpoints
    without `base`: D = G (K−1).
    """

    base: int
    kind: ClassVar[str] = "affine"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_base(self.base, self.num_checkpoints)
        if self.num_checkpoints < 2:
            raise ConfigError("expected at least 2 checkpoints for the affine map, got 1")

    @property
    def dim(self) -> int:
        return self.num_groups * (self.num_checkpoints - 1)

    def __call__(self, theta: Tensor) -> Tensor:
        moves = self.scale * _rows(theta, self.num_groups, self.dim)
        before, after = moves[:, : self.base], moves[:, self.base :]
        return self.init + torch.cat([before, -moves.sum(1, keepdim=True), after], dim=1)

    def theta_of(self, coefficients: Tensor) -> Tensor:
        """The inverse: rows must have the sum of `init`, to 1e-6."""
        moves = _moves(coefficients, self.init, self.num_groups)
        if float(moves.sum(1).abs().max()) > 1e-6:
            sums = coefficients.reshape(self.num_groups, -1).sum(1).tolist()
            total = float(self.init.sum())
            raise ConfigError(f"the affine map keeps the sum {total:g} of a row, got {sums}")
        others = torch.cat([moves[:, : self.base], moves[:, self.base + 1 :]], dim=1)
        return others.flatten() / self.scale


@dataclass(frozen=True, eq=False, kw_only=True)
class FreeMap(_ShiftedInit):
    """init + scale · theta: no constraint, the sum may drift. D = G K."""

    kind: ClassVar[str] = "free"

    def __call__(self, theta: Tensor) -> Tensor:
        return self.init + self.scale * _rows(theta, self.num_groups, self.dim)

    def theta_of(self, coefficients: Tensor) -> Tensor:
        """The inverse."""
        return _moves(coefficients, self.init, self.num_groups).flatten() / self.scale


@dataclass(frozen=True, eq=False, kw_only=True)
class SoftmaxMap(_ShiftedInit):
    """softmax(log(init) + scale · theta): non-negative rows that sum to 1. D = G K.

    A zero in `init` has a logit of −∞ that no theta can move, so an init with zeros is smoothed to
    (1 − ε) init + ε/K with ε = 0.1, and theta = 0 then gives the *smoothed* init. An init that is
    positive throughout is kept as it is.
    """

    kind: ClassVar[str] = "softmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        total = float(self.init.sum())
        if bool((self.init < 0).any()) or abs(total - 1) > 1e-6:
            got = f"{self.init.tolist()}, sum {total:g}"
            raise ConfigError(f"expected init >= 0 with sum 1 for the softmax map, got {got}")

    @property
    def start(self) -> Tensor:
        """The coefficients (K,) at theta = 0."""
        if bool((self.init > 0).all()):
            return self.init
        return (1 - SMOOTHING) * self.init + SMOOTHING / self.num_checkpoints

    def __call__(self, theta: Tensor) -> Tensor:
        rows = _rows(theta, self.num_groups, self.dim)
        return torch.softmax(self.start.log() + self.scale * rows, dim=1)

    def theta_of(self, coefficients: Tensor) -> Tensor:
        """An inverse: of the thetas that give the same row, the one without a common offset."""
        rows = coefficients.to(torch.float64).reshape(self.num_groups, -1)
        if bool((rows <= 0).any()) or float((rows.sum(1) - 1).abs().max()) > 1e-6:
            raise ConfigError(
                f"the softmax map reaches rows above 0 with sum 1, got {rows.tolist()}"
            )
        return ((rows.log() - self.start.log()) / self.scale).flatten()


@dataclass(frozen=True, eq=False, kw_only=True)
class EmaMap:
    """Post-hoc EMA profiles: theta moves the width and the end time of one profile a group.

        ema_std = ema_std[base] · exp(scale · theta_0)     kept inside STD_RANGE
        end     = nimg[base] · exp(scale · theta_1)        at least the earliest checkpoint's nimg,
                                                           at most the newest one's
        coefficients = posthoc_coefficients(checkpoints up to end, end, ema_std)

    Checkpoints later than `end` get 0, as the profile gives no weight to what it has not seen.
    theta = 0 is exactly the checkpoint `base`. `nimg` and `ema_std` are (K,); D = 2 G.
    """

    nimg: Tensor
    ema_std: Tensor
    base: int
    scale: float
    num_groups: int = 1
    kind: ClassVar[str] = "ema"

    def __post_init__(self) -> None:
        object.__setattr__(self, "nimg", self.nimg.to(torch.float64))
        object.__setattr__(self, "ema_std", self.ema_std.to(torch.float64))
        _check_sizes(self.num_checkpoints, self.num_groups, self.scale)
        _check_base(self.base, self.num_checkpoints)
        lowest, highest = STD_RANGE
        start = float(self.ema_std[self.base])
        if not lowest <= start <= highest:
            raise ConfigError(
                f"expected an ema_std of {lowest} to {highest} at the start, got {start:g}"
            )
        # Once, here: repeated or misshapen inputs would otherwise surface in the first round.
        posthoc_coefficients(self.nimg, self.ema_std, self.nimg, self.ema_std)

    @property
    def num_checkpoints(self) -> int:
        return self.nimg.numel()

    @property
    def dim(self) -> int:
        return 2 * self.num_groups

    def __call__(self, theta: Tensor) -> Tensor:
        factors = (self.scale * _rows(theta, self.num_groups, self.dim)).exp()
        widths = (self.ema_std[self.base] * factors[:, 0]).clamp(*STD_RANGE)
        ends = (self.nimg[self.base] * factors[:, 1]).clamp(self.nimg.min(), self.nimg.max())
        rows = [self._row(end, width) for end, width in zip(ends, widths, strict=True)]
        return torch.stack(rows)

    def theta_of(self, coefficients: Tensor) -> Tensor:
        """Of the checkpoint at the start alone: which profile a row belongs to is not sought."""
        origin = torch.zeros(self.dim, dtype=torch.float64)
        rows = coefficients.to(torch.float64).reshape(self.num_groups, -1)
        if not torch.equal(rows, self(origin)):
            raise ConfigError(
                "the ema map reaches EMA profiles alone, "
                f"expected those of its start, got {rows.tolist()}"
            )
        return origin

    def _row(self, end: Tensor, width: Tensor) -> Tensor:
        if bool(end.isnan() | width.isnan()):
            return torch.full_like(self.nimg, torch.nan)
        seen = self.nimg <= end
        row = torch.zeros_like(self.nimg)
        fitted = posthoc_coefficients(self.nimg[seen], self.ema_std[seen], end[None], width[None])
        row[seen] = fitted[:, 0]
        return row


def initial_coefficients(start: str, *, num_checkpoints: int, base: int) -> Tensor:
    """Where a search begins, (K,) float64: "newest" is all of `base`, "uniform" the average."""
    _check_base(base, num_checkpoints)
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
) -> CoefficientMap:
    """The map of that kind: "affine", "free", "softmax" or "ema" (needs `nimg` and `ema_std`).

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
    if kind != "ema":
        raise UnknownNameError("coefficient map", kind, ("affine", "ema", "free", "softmax"))
    alone = initial_coefficients("newest", num_checkpoints=num_checkpoints, base=base)
    if not torch.equal(init.to(alone), alone):
        got = init.tolist()
        raise ConfigError(f"expected the ema map to start at checkpoint {base} alone, got {got}")
    times = _known("nimg", nimg, num_checkpoints)
    widths = _known("ema_std", ema_std, num_checkpoints)
    return EmaMap(nimg=times, ema_std=widths, base=base, scale=scale, num_groups=num_groups)


def _rows(theta: Tensor, num_groups: int, dim: int) -> Tensor:
    if tuple(theta.shape) != (dim,):
        raise ConfigError(f"expected theta of shape ({dim},), got {tuple(theta.shape)}")
    return theta.to(torch.float64).reshape(num_groups, -1)


def _moves(coefficients: Tensor, init: Tensor, num_groups: int) -> Tensor:
    expected = (num_groups, init.numel())
    if tuple(coefficients.shape) != expected:
        raise ConfigError(f"expected coefficients {expected}, got {tuple(coefficients.shape)}")
    return coefficients.to(torch.float64) - init


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


def _check_base(base: int, num_checkpoints: int) -> None:
    if not 0 <= base < num_checkpoints:
        raise ConfigError(f"expected base in 0..{num_checkpoints - 1}, got {base}")


def _check_sizes(num_checkpoints: int, num_groups: int, scale: float) -> None:
    if num_checkpoints < 1 or num_groups < 1:
        got = f"{num_checkpoints} checkpoints and {num_groups} groups"
        raise ConfigError(f"expected at least one checkpoint and one group, got {got}")
    if not 0 < scale < float("inf"):
        raise ConfigError(f"expected a finite scale > 0, got {scale}")
