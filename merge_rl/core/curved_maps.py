"""Maps that bend: softmax weights, and post-hoc EMA profiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from merge_rl.core.ema_profiles import posthoc_coefficients
from merge_rl.core.map_parts import ShiftedInit, check_base, check_sizes, theta_rows
from merge_rl.errors import ConfigError

SMOOTHING = 0.1  # share of the uniform average mixed into a softmax start that has zeros
STD_RANGE = (0.001, 0.288)  # widths a search may reach, inside the open interval (0, 1/√12)


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
        check_sizes(self.num_checkpoints, self.num_groups, self.scale)
        check_base(self.base, self.num_checkpoints)
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
        factors = (self.scale * theta_rows(theta, self.num_groups, self.dim)).exp()
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
