"""The EDM sampler: noise schedule, probability-flow ODE, solver loop, stochastic churn."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_rl.config import SamplerConfig
from merge_rl.core.sampling.sde import Gaussian, NoiseSource
from merge_rl.core.sampling.solvers import OnStep, Velocity, find_tableau, runge_kutta_step
from merge_rl.errors import ConfigError


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
    draw: NoiseSource | None = None,
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


@dataclass(frozen=True, kw_only=True)
class EDMSDE:
    """Towards lower noise levels: dx = (sigma + w) S |dsigma| + sqrt(2 w |dsigma|) dW, w = q sigma.

    S = (D - x) / sigma^2 is the score. q = 0 is the ODE and q = 1 the reverse of the process that
    adds noise (Song et al., 2021, arXiv:2011.13456); any q keeps the marginals (Karras et al.,
    2022, arXiv:2206.00364, equation 6 with beta = q / sigma). Noise levels of few-step rollouts
    halve from one to the next, where the Euler-Maruyama formula would add far too much noise;
    both steps below therefore integrate what is linear exactly. With r = sigma_next / sigma:

        sde-euler: D is held still over the step, which makes the SDE linear in x:
            mean D + r^(1 + q) (x - D),    std sigma_next sqrt(1 - r^(2 q))
        sde-heun: all noise of the step first, y = x + sqrt(q (sigma^2 - sigma_next^2)) z, then
            Heun's step of the ODE from the level sqrt(sigma^2 + q (sigma^2 - sigma_next^2))

    The last interval, to sigma = 0, adds no noise and ends in D.

    Args:
        denoise: (x, sigma) -> D, in the precision of the state.
        sigmas: (N + 1,), decreasing, the last one 0.
        norm: q.
        heun: whether to take the second-order step.
    """

    denoise: Velocity
    sigmas: Tensor
    norm: float = 1.0
    heun: bool = False

    @property
    def num_noisy(self) -> int:
        """N - 1."""
        return len(self.sigmas) - 2

    def start(self, noise: Tensor) -> Tensor:
        """noise * sigmas[0], in the precision of the levels."""
        return noise.to(self.sigmas.dtype) * self.sigmas[0]

    def gaussian(self, index: int, x: Tensor) -> Gaussian:
        """What step `index` draws from: of x_next, or for Heun of the state it starts from."""
        sigma, sigma_next = self.sigmas[index], self.sigmas[index + 1]
        if self.heun:
            return Gaussian(x, self._extra(index).sqrt())
        ratio = sigma_next / sigma
        denoised = self.denoise(x, sigma)
        mean = denoised + ratio ** (1 + self.norm) * (x - denoised)
        return Gaussian(mean, sigma_next * (1 - ratio ** (2 * self.norm)).sqrt())

    def advance(self, index: int, drawn: Tensor) -> Tensor:
        """What was drawn, or for Heun the end of the ODE step that starts there."""
        if not self.heun:
            return drawn
        raised = (self.sigmas[index].square() + self._extra(index)).sqrt()
        velocity, heun = edm_velocity(self.denoise), find_tableau("heun")
        return runge_kutta_step(heun, velocity, drawn, raised, self.sigmas[index + 1])

    def last(self, x: Tensor) -> Tensor:
        """D at the last level above 0."""
        return self.denoise(x, self.sigmas[-2])

    def _extra(self, index: int) -> Tensor:
        """Variance that a Heun step adds: the integral of 2 w over the interval."""
        here, ahead = self.sigmas[index].square(), self.sigmas[index + 1].square()
        return self.norm * (here - ahead)


def edm_noise_levels(
    num_steps: int,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Decreasing noise levels (num_steps + 1,) of an EDM rollout, the last one exactly 0.

        sigma_i = (sigma_max^(1/rho) + i / (N - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho

    for i = 0..N-1, then 0 (Karras et al., 2022, arXiv:2206.00364, equation 5). `num_steps` N
    counts solver intervals. Raises ConfigError for N < 2 (the formula divides by N - 1) and unless
    0 < sigma_min < sigma_max and rho > 0, both finite.
    """
    if num_steps < 2:
        raise ConfigError(f"need num_steps >= 2 for EDM noise levels, got {num_steps}")
    if not (0 < sigma_min < sigma_max < math.inf and 0 < rho < math.inf):
        raise ConfigError(
            "need 0 < sigma_min < sigma_max and rho > 0, both finite, "
            f"got sigma_min={sigma_min}, sigma_max={sigma_max}, rho={rho}"
        )
    fraction = torch.arange(num_steps, dtype=dtype) / (num_steps - 1)
    start, end = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = (start + fraction * (end - start)) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


# All grids are on the CPU: arithmetic with single numbers then costs an accelerator nothing.


def levels_of(
    settings: SamplerConfig, model: object = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The levels (num_steps + 1,) to visit: the network's own, or those that settings describe.

    A network may have `noise_levels(num_steps, dtype)` of its own: those of the steps that it was
    trained on. `levels: edm` asks for those of `edm_noise_levels` all the same.
    """
    own = getattr(model, "noise_levels", None)
    if own is not None and settings.levels == "own":
        visited: Tensor = own(settings.num_steps, dtype)
        return visited
    return edm_noise_levels(
        settings.num_steps,
        sigma_min=settings.sigma_min,
        sigma_max=settings.sigma_max,
        rho=settings.rho,
        dtype=dtype,
    )
