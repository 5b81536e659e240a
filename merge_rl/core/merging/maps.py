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

from merge_rl.core.merging.ema_profiles import Profiles, exponent_from_std, std_from_exponent
from merge_rl.core.merging.linear_maps import (
    AffineMap,
    FreeMap,
    ShiftedInit,
    WhitenedMap,
    check_base,
    check_sizes,
    theta_rows,
)
from merge_rl.errors import ConfigError, UnknownNameError

MAPS = ("whitened", "affine", "free", "softmax", "ema")


class CoefficientMap(Protocol):
    """theta (D,) -> coefficients (G, K) float64; theta = 0 gives the starting coefficients."""

    @property
    def kind(self) -> str: ...  # one of MAPS
    @property
    def num_checkpoints(self) -> int: ...  # K
    @property
    def num_groups(self) -> int: ...  # G
    @property
    def dim(self) -> int: ...  # D
    def __call__(self, theta: Tensor) -> Tensor: ...
    def theta_of(self, coefficients: Tensor) -> Tensor:
        """The theta (D,) that gives coefficients (G, K); ConfigError where none does."""
        ...


class AroundMap:
    """What a map around another one, `inner`, has of it: name and numbers."""

    inner: CoefficientMap

    @property
    def kind(self) -> str:
        """The name of the inner map."""
        return self.inner.kind

    @property
    def num_checkpoints(self) -> int:
        """Number of checkpoints K."""
        return self.inner.num_checkpoints

    @property
    def num_groups(self) -> int:
        """Number of groups G."""
        return self.inner.num_groups


@dataclass(frozen=True, eq=False)
class BoundedMap(AroundMap):
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
    def dim(self) -> int:
        """Length of theta."""
        return self.inner.dim

    def __call__(self, theta: Tensor) -> Tensor:
        start = self.inner(torch.zeros_like(theta))
        moves = self.inner(theta) - start
        # How far each coefficient may go in the direction it takes. One that does not move is
        # not divided by: its derivative would be 0 / 0.
        still = moves == 0
        room = (self.limit - start * moves.sign()) / moves.abs().masked_fill(still, 1.0)
        share = room.masked_fill(still, torch.inf).amin(1, keepdim=True).clamp(max=1)
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
    profiles: Profiles | None = None,
    gram: Tensor | None = None,
) -> CoefficientMap:
    """The map of that kind, one of `MAPS`: "ema" needs `profiles`, "whitened" `gram`.

    `nimg` and `ema_std` are profiles too, where no exponents are known.

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
    if profiles is None:
        times = _known("nimg", nimg, num_checkpoints)
        profiles = Profiles.of_widths(times, _known("ema_std", ema_std, num_checkpoints))
    return EmaMap(profiles=profiles, base=base, scale=scale, num_groups=num_groups)


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


SMOOTHING = 0.1  # share of the uniform average mixed into a softmax start that has zeros
STD_RANGE = (0.001, 0.288)  # widths a search may reach, inside the open interval (0, 1/√12)
NARROWEST = 997.0  # exponent of the narrowest


@dataclass(frozen=True, eq=False, kw_only=True)
class SoftmaxMap(ShiftedInit):
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
        rows = theta_rows(theta, self.num_groups, self.dim)
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
        coefficients = those of `Profiles.row(end, exponent of ema_std)`

    Of a start wider than the flat profile, which no ema_std says, γ + 1 is divided by exp(scale ·
    theta_0) instead. Checkpoints later than `end` get 0, as the profile gives no weight to what it
    has not seen. theta = 0 is exactly the checkpoint `base`. D = 2 G.
    """

    profiles: Profiles
    base: int
    scale: float
    num_groups: int = 1
    kind: ClassVar[str] = "ema"

    def __post_init__(self) -> None:
        check_sizes(self.num_checkpoints, self.num_groups, self.scale)
        check_base(self.base, self.num_checkpoints)
        lowest, highest = STD_RANGE
        gamma = self.profiles.gamma[self.base]
        if gamma > 0 and not lowest <= std_from_exponent(float(gamma)) <= highest:
            raise ConfigError(
                f"expected an ema_std of {lowest} to {highest} at the start, got "
                f"{std_from_exponent(float(gamma)):g}"
            )
        # Once, here: repeated or misshapen inputs would otherwise surface in the first round.
        self.profiles.coefficients(self.profiles)

    @property
    def num_checkpoints(self) -> int:
        """Number of checkpoints K."""
        return self.profiles.nimg.numel()

    @property
    def dim(self) -> int:
        """Length of theta."""
        return 2 * self.num_groups

    def __call__(self, theta: Tensor) -> Tensor:
        factors = (self.scale * theta_rows(theta, self.num_groups, self.dim)).exp()
        nimg = self.profiles.nimg
        ends = (nimg[self.base] * factors[:, 1]).clamp(nimg.min(), nimg.max())
        rows = [self._row(end, wider) for end, wider in zip(ends, factors[:, 0], strict=True)]
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

    def _row(self, end: Tensor, wider: Tensor) -> Tensor:
        gamma = self.profiles.gamma[self.base]
        if bool(end.isnan() | wider.isnan()):
            return torch.full_like(self.profiles.nimg, torch.nan)
        if gamma > 0:
            width = (std_from_exponent(gamma) * wider).clamp(*STD_RANGE)
            moved = exponent_from_std(width)
        else:
            moved = ((gamma + 1) / wider - 1).clamp(max=NARROWEST)
        # Exact at the origin, where a width there and back would differ in its last bits.
        moved = torch.where(wider == 1, gamma + (moved - moved.detach()), moved)
        return self.profiles.row(end, moved)
