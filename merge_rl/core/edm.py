"""The probability-flow ODE of EDM: slope, solver loop, churn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from merge_rl.core.solvers import OnStep, Velocity, find_tableau, runge_kutta_step
from merge_rl.errors import ConfigError

Draw: TypeAlias = Callable[[], Tensor]
"""A source of unit normal noise of the shape of the state."""


@dataclass(frozen=True, kw_only=True)
class Churn:
    """Noise added back before a step (Karras et al., 2022, algorithm 2); amount 0 is none."""

    amount: float = 0.0  # S_churn: total, spread over the steps
    sigma_min: float = 0.0  # S_min, S_max: only in this range of noise levels
    sigma_max: float = math.inf
    noise_scale: float = 1.0  # S_noise

    def raised_level(self, sigma: Tensor, num_steps: int) -> Tensor | None:
        """The noise level to climb to from sigma, or None where nothing is added."""
        if not (self.amount > 0 and self.sigma_min <= float(sigma) <= self.sigma_max):
            return None
        gamma = min(self.amount / num_steps, math.sqrt(2) - 1)
        return sigma + gamma * sigma


def edm_velocity(denoise: Velocity) -> Velocity:
    """dx/dsigma = (x - D(x; sigma)) / sigma: the probability-flow ODE of EDM (equation 3)."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return (x - denoise(x, sigma)) / sigma

    return velocity


def solve_edm(
    velocity: Velocity,
    noise: Tensor,
    sigmas: Tensor,
    *,
    solver: str = "heun",
    churn: Churn | None = None,
    draw: Draw | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Integrate dx/dsigma over decreasing noise levels.

    Args:
        velocity: (x, sigma) -> dx/dsigma.
        noise: (B, C, h, w) of unit variance; the rollout starts from noise * sigmas[0].
        sigmas: (N + 1,), decreasing, the last one 0; their dtype is that of the state.
        solver: a fixed-step method, see `TABLEAUS`. The slope is not defined at sigma = 0, so the
            last interval is an Euler step for methods that evaluate it there (heun, rk4).
        churn: noise added back; needs `draw`.
        draw: unit-variance noise of the shape of the state, called once for each churned step.
        on_step: hears of every finished interval.
    """
    tableau, euler = find_tableau(solver), find_tableau("euler")
    num_steps = len(sigmas) - 1
    x = noise.to(sigmas.dtype) * sigmas[0]
    for i in range(num_steps):
        sigma = sigmas[i]
        raised = churn.raised_level(sigma, num_steps) if churn else None
        if churn and raised is not None:
            if draw is None:
                raise ConfigError("churn adds noise: pass draw, a source of unit-variance noise")
            extra = (raised.square() - sigma.square()).sqrt() * churn.noise_scale
            x, sigma = x + extra * draw().to(x), raised
        stops_short = i < num_steps - 1 or not tableau.reaches_end
        method = tableau if stops_short else euler
        x = runge_kutta_step(method, velocity, x, sigma, sigmas[i + 1])
        if on_step is not None:
            on_step(i, x)
    return x
