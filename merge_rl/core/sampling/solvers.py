"""Explicit Runge-Kutta methods as data, one loop for them, and an adaptive solver."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from torch import Tensor

from merge_rl.errors import (
    MissingLibraryError,
    NonFiniteSamplesError,
    UnknownNameError,
)

Velocity: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(x, t) -> dx/dt, of the shape of x; t is 0-dim."""

OnStep: TypeAlias = Callable[[int, Tensor], None]
"""Called as (index of the interval, x at its end)."""


@dataclass(frozen=True)
class Tableau:
    """k_i = v(x + h sum_j matrix[i][j] k_j, t + nodes[i] h);   x <- x + h sum_i weights[i] k_i."""

    order: int
    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]  # strictly lower triangular: row i has i numbers
    weights: tuple[float, ...]

    @property
    def stages(self) -> int:
        """Network calls a step."""
        return len(self.nodes)

    @property
    def reaches_end(self) -> bool:
        """Whether a step evaluates the velocity at its own end."""
        return 1.0 in self.nodes


TABLEAUS: Final[Mapping[str, Tableau]] = {
    "euler": Tableau(1, (0.0,), ((),), (1.0,)),
    # The explicit trapezoid: algorithm 1 of Karras et al., 2022 (arXiv:2206.00364).
    "heun": Tableau(2, (0.0, 1.0), ((), (1.0,)), (1 / 2, 1 / 2)),
    "midpoint": Tableau(2, (0.0, 1 / 2), ((), (1 / 2,)), (0.0, 1.0)),
    "heun3": Tableau(3, (0.0, 1 / 3, 2 / 3), ((), (1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4)),
    # Kutta's 3/8 rule, not the classical method of the same order.
    "rk4": Tableau(
        4,
        (0.0, 1 / 3, 2 / 3, 1.0),
        ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
        (1 / 8, 3 / 8, 3 / 8, 1 / 8),
    ),
}


def find_tableau(solver: str) -> Tableau:
    """The method called `solver`; UnknownNameError suggests the nearest one."""
    if solver not in TABLEAUS:
        raise UnknownNameError("solver", solver, TABLEAUS)
    return TABLEAUS[solver]


def runge_kutta_step(
    tableau: Tableau, velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor
) -> Tensor:
    """x at t_next, from x at t; t_next may lie before t."""
    h = t_next - t
    slopes: list[Tensor] = []
    for node, row in zip(tableau.nodes, tableau.matrix, strict=True):
        # t + 1 h may miss t_next by a rounding, and a grid can end where the velocity does.
        at = t_next if node == 1 else t + node * h if node else t
        slopes.append(velocity(x + h * _combine(row, slopes) if any(row) else x, at))
    return x + h * _combine(tableau.weights, slopes)


def _combine(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    """Weighted sum; the terms of weight 0 are left out, those of weight 1 not multiplied."""
    terms = [
        slope if weight == 1 else weight * slope
        for weight, slope in zip(weights, slopes, strict=True)
        if weight
    ]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def solve_fixed(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    *,
    solver: str = "heun",
    open_end: bool = False,
    on_step: OnStep | None = None,
) -> Tensor:
    """Integrate dx/dt = velocity over a monotone grid.

    Args:
        velocity: (x, t) -> dx/dt.
        x: (B, ...) at times[0]; its dtype is that of the state.
        times: (N + 1,), rising or falling.
        solver: a name of `TABLEAUS`; N steps of it.
        open_end: the velocity is not asked for at times[-1]: the last interval is an Euler step
            for methods that evaluate it there (heun, rk4).
        on_step: hears of every finished interval.

    Returns x at times[-1].
    """
    tableau, euler = find_tableau(solver), find_tableau("euler")
    last = euler if open_end and tableau.reaches_end else tableau
    for i in range(len(times) - 1):
        method = tableau if i < len(times) - 2 else last
        x = runge_kutta_step(method, velocity, x, times[i], times[i + 1])
        if on_step is not None:
            on_step(i, x)
    return x


def solve_adaptive(
    velocity: Velocity,
    x: Tensor,
    start: float,
    end: float,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    method: str = "dopri5",
    overshoot: bool = True,
) -> Tensor:
    """Integrate dx/dt = velocity from start to end; returns x at the end.

    Args:
        velocity: (x, t) -> dx/dt.
        x: (B, ...) at `start`.
        rtol, atol: tolerances of a step, relative and absolute, as rms over the batch.
        method: a name of torchdiffeq's.
        overshoot: let the last step pass the end and interpolate, as the library does by itself;
            otherwise a step ends there, for velocities that are not defined beyond.

    Raises ConfigError where torchdiffeq is not installed.
    """
    try:
        import torchdiffeq
    except ImportError:
        raise MissingLibraryError(f"the solver {method!r}", "torchdiffeq", "adaptive") from None
    times = torch.tensor([start, end], dtype=x.dtype, device=x.device)
    options = None if overshoot else {"step_t": times[1:]}
    states: Tensor = torchdiffeq.odeint(
        lambda t, y: velocity(y, t), x, times, rtol=rtol, atol=atol, method=method, options=options
    )
    return states[-1]


class NormWatch:
    """Norms of all images after every step, kept on the device and looked at once.

    Use as the `on_step` of a solver; `check` raises at the end.
    """

    def __init__(self, start: Tensor) -> None:
        self._norms = [_norms(start)]

    def __call__(self, _index: int, x: Tensor) -> None:
        """Note the norms (B,) of x (B, ...)."""
        self._norms.append(_norms(x))

    def check(self) -> None:
        """Raise NonFiniteSamplesError with the first step, the image and its norms."""
        norms = torch.stack(self._norms).cpu()  # (steps + 1, B)
        odd = ~norms.isfinite()
        if not bool(odd.any()):
            return
        step, image = (int(i) for i in odd.nonzero()[0])
        if step == 0:
            raise NonFiniteSamplesError(
                f"the starting noise of image {image} of the batch is not finite"
            )
        before, after = float(norms[step - 1, image]), float(norms[step, image])
        raise NonFiniteSamplesError(
            f"samples are not finite after step {step} of {len(norms) - 1}: the norm of image "
            f"{image} of the batch went from {before:g} to {after:g}"
        )


def _norms(x: Tensor) -> Tensor:
    # In float64 where x is, so that a large but finite image is not taken for an infinite one.
    norms: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norms
