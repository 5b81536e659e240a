"""The losses that the two families of networks are trained with, on given samples and noise."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_rl.core.interpolants import Path
from merge_rl.interfaces import Denoiser


def velocity_loss(
    model: Denoiser, path: Path, data: Tensor, labels: Tensor | None, t: Tensor, noise: Tensor
) -> Tensor:
    """Velocity matching: mean of |v(x_t, t) - dx_t/dt|^2 over all values, ().

        x_t = alpha(t) data + sigma(t) noise,    dx_t/dt = alpha'(t) data + sigma'(t) noise

    (Ma et al., 2024, arXiv:2401.08740, equation 5.) data, noise (B, C, h, w), t (B,) in [0, 1].
    """
    at = t.reshape(-1, *[1] * (data.ndim - 1))
    x = path.alpha(at) * data + path.sigma(at) * noise
    target = path.d_alpha(at) * data + path.d_sigma(at) * noise
    return (model(x, t, labels) - target).square().mean()


def denoising_loss(
    model: Denoiser,
    data: Tensor,
    labels: Tensor | None,
    sigma: Tensor,
    noise: Tensor,
    *,
    sigma_data: float,
) -> Tensor:
    """EDM's: mean of w(sigma) |D(data + sigma noise; sigma) - data|^2 over all values, ().

        w(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2

    (Karras et al., 2022, arXiv:2206.00364, equation 2 and table 1.) data, noise (B, C, h, w),
    sigma (B,) > 0. EDM2's uncertainty head divides it by a learned function of sigma; a network
    that is trained already is at w = 1 for its own unit-variance target, and does without.
    """
    at = sigma.reshape(-1, *[1] * (data.ndim - 1))
    weight = (at.square() + sigma_data**2) / (at * sigma_data).square()
    error = model(data + at * noise, sigma, labels) - data
    return (weight * error.square()).mean()


def log_normal_levels(normal: Tensor, mean: float, std: float) -> Tensor:
    """Noise levels exp(mean + std z) of unit normal z, the training distribution of EDM."""
    return torch.exp(mean + std * normal)


def uniform_times(uniform: Tensor, end: float) -> Tensor:
    """Times in [0, end) from u in [0, 1): a path's velocity may have no limit at t = 1."""
    return uniform * end
