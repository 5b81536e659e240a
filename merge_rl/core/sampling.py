"""ODE solvers: from noise to samples, deterministically unless churn is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from torch import Tensor

from merge_rl.core.schedules import edm_noise_levels
from merge_rl.errors import ConfigError, UnknownNameError
from merge_rl.interfaces import Denoiser

Velocity: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(x, t) -> dx/dt, of the shape of x; t is 0-dim."""

Step: TypeAlias = Callable[[Velocity, Tensor, Tensor, Tensor], Tensor]
"""(velocity, x, t, t_next) -> x at t_next."""


def euler_step(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """x + (t_next - t) v(x, t): one network call, order 1."""
    return x + (t_next - t) * velocity(x, t)


def heun_step(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Euler step, then the mean of the slopes at both ends: two network calls, order 2.

    Karras et al., 2022 (arXiv:2206.00364), algorithm 1.
    """
    slope = velocity(x, t)
    ahead = velocity(x + (t_next - t) * slope, t_next)
    return x + (t_next - t) * (slope + ahead) / 2


STEPS: Final[Mapping[str, Step]] = {"euler": euler_step, "heun": heun_step}


def count_network_calls(solver: str, num_steps: int) -> int:
    """Network calls an image costs (nfe), per network: N for Euler, 2N - 1 for Heun."""
    _require_solver(solver)
    return num_steps if solver == "euler" else 2 * num_steps - 1


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
        # The network works in float32 whatever the precision of the state.
        denoised = denoise(x.float(), sigma.float()).to(x.dtype)
        return (x - denoised) / sigma

    return velocity


def guided(model: Denoiser, guide: Denoiser, guidance: float) -> Denoiser:
    """D_guide + guidance (D - D_guide), at the same x, sigma, labels (arXiv:2406.02507, eq. 3)."""

    def denoise(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        weaker = guide(x, sigma, labels)
        return weaker + guidance * (model(x, sigma, labels) - weaker)

    return denoise


def solve_edm(
    velocity: Velocity,
    noise: Tensor,
    sigmas: Tensor,
    *,
    solver: str = "heun",
    churn: Churn | None = None,
    draw: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Integrate dx/dsigma over decreasing noise levels.

    Args:
        velocity: (x, sigma) -> dx/dsigma.
        noise: (B, C, h, w) of unit variance; the rollout starts from noise * sigmas[0].
        sigmas: (N + 1,), decreasing, the last one 0; their dtype is that of the state.
        solver: "heun" or "euler". The last interval ends where the slope is not defined, so it is
            an Euler step for both.
        churn: noise added back; needs `draw`.
        draw: unit-variance noise of the shape of the state, called once for each churned step.
    """
    step = STEPS[_require_solver(solver)]
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
        take = step if i < num_steps - 1 else euler_step
        x = take(velocity, x, sigma, sigmas[i + 1])
    return x


def sample(
    model: Denoiser,
    noise: Tensor,
    labels: Tensor | None = None,
    *,
    solver: str = "heun",
    num_steps: int = 32,
    guidance: float = 1.0,
    guide: Denoiser | None = None,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    churn: Churn | None = None,
    draw: Callable[[], Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Samples (B, C, h, w) of `dtype` from noise of unit variance, by ODE.

    Args:
        model: EDM2 denoiser D(x; sigma, labels).
        noise: (B, C, h, w).
        labels: (B,) int64 class ids, (B, K) float rows, or None.
        solver, num_steps: "heun" (2 num_steps - 1 network calls) or "euler" (num_steps).
        guidance: strength; 1 is off and then `guide` is not called.
        guide: the weaker network; needed where guidance differs from 1.
        sigma_min, sigma_max, rho: the noise levels, see `edm_noise_levels`.
        churn, draw: see `solve_edm`; without churn the result is a function of the noise alone.
        dtype: of the solver's state; the network always works in float32.

    Raises ConfigError for settings that cannot work, UnknownNameError for an unknown solver.
    """
    if guidance != 1 and guide is None:
        raise ConfigError(f"guidance {guidance} needs a guide network; 1 switches guidance off")
    net = guided(model, guide, guidance) if guide is not None and guidance != 1 else model
    levels = edm_noise_levels(
        num_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho, dtype=dtype
    ).to(noise.device)
    with torch.no_grad():
        velocity = edm_velocity(lambda x, sigma: net(x, sigma, labels))
        return solve_edm(velocity, noise, levels, solver=solver, churn=churn, draw=draw)


def _require_solver(solver: str) -> str:
    if solver not in STEPS:
        raise UnknownNameError("solver", solver, STEPS)
    return solver
