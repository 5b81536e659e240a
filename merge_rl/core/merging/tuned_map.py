"""A search vector that holds more than coefficients: guidance, and the coefficients of a guide.

What a merge is sampled with then stands in rows below its coefficients, so that whatever is handed
a candidate's coefficients is handed all of it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from merge_rl.core.merging.maps import AroundMap, CoefficientMap
from merge_rl.errors import ConfigError

STRENGTH_UNIT: Final = 0.2  # of the logarithm of the strength, a unit of theta
END_UNIT: Final = 0.1  # of the rollout's steps
GUIDANCE: Final = 3  # values: strength, low, high


class Setup(NamedTuple):
    """Coefficients (G, K), strength with interval (3,), the guide's coefficients (G', K').

    None is what a search leaves as it is.
    """

    coefficients: Tensor
    guidance: Tensor | None = None
    guide: Tensor | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, without what is left as it is."""
        found: dict[str, Any] = {"coefficients": self.coefficients.tolist()}
        if self.guidance is not None:
            strength, *ends = self.guidance.tolist()
            found["guidance"] = {"strength": strength, "interval": ends}
        if self.guide is not None:
            found["guide_coefficients"] = self.guide.tolist()
        return found


@dataclass(frozen=True)
class Layout:
    """Where the rows (R, W) of a candidate hold what, after its G rows of K coefficients.

    Rows (G, K) alone are a merge whose guidance is that of the settings.
    """

    groups: int
    checkpoints: int
    guidance: bool = False
    guide: tuple[int, int] | None = None  # (G', K')

    def join(self, setup: Setup) -> Tensor:
        """Rows (R, W), padded with zeros."""
        values = None if setup.guidance is None else setup.guidance[None]
        parts = [part for part in (setup.coefficients, values, setup.guide) if part is not None]
        width = max(part.shape[1] for part in parts)
        return torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[1])) for p in parts])

    def split(self, rows: Tensor) -> Setup:
        """What `join` joined, or a merge alone."""
        if tuple(rows.shape) == (self.groups, self.checkpoints):
            return Setup(rows)
        at = self.groups + self.guidance
        values = rows[self.groups, :GUIDANCE] if self.guidance else None
        below = None if self.guide is None else rows[at : at + self.guide[0], : self.guide[1]]
        return Setup(rows[: self.groups, : self.checkpoints], values, below)


@dataclass(frozen=True, eq=False)
class GuidanceCoordinates:
    """Three values of theta -> strength, low and high (3,) float64; zeros give the start.

        strength = start exp(STRENGTH_UNIT theta_0)
        ends: places on the grid of the rollout's steps, moved by END_UNIT N theta_i of its N steps

    so that a strength stays above 0, and an end moves by equally many steps everywhere. An end that
    would leave the grid comes back into it as from a mirror, and the lower of both is `low`: both
    have a derivative everywhere, and no theta is beyond reach of one.

    Args:
        start: (3,) strength > 0, low, high; ends beyond the grid count as its own.
        grid: (N + 1,) levels or times, rising or falling.
    """

    start: Tensor
    grid: Tensor

    def __post_init__(self) -> None:
        if not float(self.start[0]) > 0:
            raise ConfigError(
                f"the strength of guidance is tuned by factors: expected a start above 0, got "
                f"{float(self.start[0]):g}"
            )

    def __call__(self, theta: Tensor) -> Tensor:
        steps = len(self.grid) - 1
        strength = self.start[0] * (STRENGTH_UNIT * theta[0]).exp()
        places = self._places(self.start[1:]) + END_UNIT * steps * theta[1:]
        ends = self._values(_mirrored(places, steps))
        low, high = (ends[0], ends[1]) if ends[0] <= ends[1] else (ends[1], ends[0])
        return torch.stack([strength, low, high])

    def _places(self, values: Tensor) -> Tensor:
        """Places 0..N of levels or times, linear between those of the grid."""
        rising = self._rising
        inside = values.clamp(rising[0], rising[-1])
        at = torch.searchsorted(rising, inside).clamp(1, len(rising) - 1)
        return at - 1 + (inside - rising[at - 1]) / (rising[at] - rising[at - 1])

    def _values(self, places: Tensor) -> Tensor:
        """The inverse."""
        rising = self._rising
        at = places.detach().long().clamp(0, len(rising) - 2)
        return rising[at] + (places - at) * (rising[at + 1] - rising[at])

    @property
    def _rising(self) -> Tensor:
        return self.grid.sort().values.double()


def _mirrored(places: Tensor, steps: int) -> Tensor:
    """Places in 0..steps: with period 2 steps, and even."""
    left = places.remainder(2 * steps)
    return torch.where(left > steps, 2 * steps - left, left)


@dataclass(frozen=True, eq=False, kw_only=True)
class TunedMap(AroundMap):
    """theta (D,) -> rows of a `Layout`: parts of theta in the order coefficients, guidance, guide.

    Args:
        inner: of the coefficients.
        fixed: coefficients (G, K) that are not searched; None: `inner` has a part of theta.
        guidance: of strength and interval; None: not searched.
        guide: of the guide's coefficients; None: not searched.
    """

    inner: CoefficientMap
    fixed: Tensor | None = None
    guidance: GuidanceCoordinates | None = None
    guide: CoefficientMap | None = None

    @property
    def layout(self) -> Layout:
        """Of what it gives."""
        guide = None if self.guide is None else (self.guide.num_groups, self.guide.num_checkpoints)
        inner = self.inner
        return Layout(inner.num_groups, inner.num_checkpoints, self.guidance is not None, guide)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Lengths of the parts of theta."""
        return (
            self.inner.dim if self.fixed is None else 0,
            0 if self.guidance is None else GUIDANCE,
            0 if self.guide is None else self.guide.dim,
        )

    @property
    def dim(self) -> int:
        """Length of theta."""
        return sum(self.sizes)

    def __call__(self, theta: Tensor) -> Tensor:
        own, values, below = torch.split(theta.to(torch.float64), list(self.sizes))
        return self.layout.join(
            Setup(
                self.inner(own) if self.fixed is None else self.fixed,
                None if self.guidance is None else self.guidance(values),
                None if self.guide is None else self.guide(below),
            )
        )

    def theta_of(self, coefficients: Tensor) -> Tensor:
        """The theta (D,) of coefficients (G, K) with guidance and guide as they start."""
        theta = torch.zeros(self.dim, dtype=torch.float64)
        if self.fixed is None:
            found = self.inner.theta_of(self.layout.split(coefficients).coefficients)
            theta[: len(found)] = found
        return theta


def setup_of(coefficients: CoefficientMap, rows: Tensor) -> Setup:
    """What rows hold that a map gave, of a map that may give coefficients alone."""
    if isinstance(coefficients, TunedMap):
        return coefficients.layout.split(rows)
    return Setup(rows)


def merge_map(coefficients: CoefficientMap) -> CoefficientMap:
    """The map of the coefficients alone."""
    return coefficients.inner if isinstance(coefficients, TunedMap) else coefficients


def anchored(coefficients: CoefficientMap, start: Tensor) -> CoefficientMap:
    """The map with a search's start (G, K) as the coefficients that it does not search."""
    if isinstance(coefficients, TunedMap) and coefficients.fixed is not None:
        return dataclasses.replace(coefficients, fixed=start)
    return coefficients


def before_and_after(coefficients: CoefficientMap, rows: Tensor) -> dict[str, Any]:
    """What a map gives beside coefficients at its start and in a result's rows, as plain data.

    {"start": ..., "result": ...}, or {} of a map of coefficients alone. Rows without it are at the
    start.
    """
    if not isinstance(coefficients, TunedMap):
        return {}
    zeros = torch.zeros(coefficients.dim, dtype=torch.float64)
    before, after = setup_of(coefficients, coefficients(zeros)), setup_of(coefficients, rows)
    if after.guidance is None and after.guide is None:
        after = before
    told = {"start": before.as_dict(), "result": after.as_dict()}
    for setup in told.values():
        del setup["coefficients"]
    return told
