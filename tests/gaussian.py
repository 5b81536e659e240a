"""The problem whose exact answer is known: data ~ Normal(MEAN, STD^2), in float64.

On a path x_t ~ Normal(alpha MEAN, alpha^2 STD^2 + sigma^2), and the velocity is the expectation
of alpha' d + sigma' e given x_t: linear in x. At a noise level x ~ Normal(MEAN, STD^2 + sigma^2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from merge_rl.core.sampling.paths import Path
from merge_rl.core.sampling.solvers import Velocity

MEAN, STD = 0.7, 0.3


def path_moments(path: Path, t: Tensor, std: float = STD) -> tuple[Tensor, Tensor]:
    """Mean and variance of x_t."""
    return path.alpha(t) * MEAN, (path.alpha(t) * std).square() + path.sigma(t).square()


def path_velocity(path: Path, std: float = STD) -> Velocity:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        mean, variance = path_moments(path, t, std)
        # sigma sigma' written as half the derivative of sigma^2, which has no 0 / 0 anywhere.
        half = path.sigma(t) * path.d_sigma(t) if float(path.sigma(t)) else torch.zeros_like(t)
        slope = (path.alpha(t) * path.d_alpha(t) * std**2 + half) / variance
        return path.d_alpha(t) * MEAN + slope * (x - mean)

    return velocity


def path_flow(path: Path, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The exact solution of the ODE: the standardised state does not change."""
    mean, variance = path_moments(path, start)
    mean_end, variance_end = path_moments(path, end)
    return mean_end + (variance_end / variance).sqrt() * (x - mean)


def denoised(x: Tensor, sigma: Tensor, std: float = STD) -> Tensor:
    """E[data | x] at a noise level."""
    kept: Tensor = std**2 / (std**2 + sigma.square())
    return MEAN + kept * (x - MEAN)


def denoised_flow(x: Tensor, sigma: float) -> Tensor:
    """The exact end, at sigma = 0, of the probability-flow ODE from x at a noise level."""
    return MEAN + STD / math.hypot(STD, sigma) * (x - MEAN)
