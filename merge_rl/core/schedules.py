"""Noise levels and time grids."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_rl.config import SamplerConfig
from merge_rl.errors import ConfigError


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
    0 < sigma_min < sigma_max and rho > 0.
    """
    if num_steps < 2:
        raise ConfigError(f"need num_steps >= 2 for EDM noise levels, got {num_steps}")
    if not (0 < sigma_min < sigma_max and rho > 0):
        raise ConfigError(
            "need 0 < sigma_min < sigma_max and rho > 0, "
            f"got sigma_min={sigma_min}, sigma_max={sigma_max}, rho={rho}"
        )
    fraction = torch.arange(num_steps, dtype=dtype) / (num_steps - 1)
    start, end = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = (start + fraction * (end - start)) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


def time_grid(num_steps: int, *, end: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Equally spaced times (num_steps + 1,) from 0 to `end`, both included.

    `num_steps` counts intervals. Raises ConfigError for less than one of them, and unless
    0 < end <= 1.
    """
    if num_steps < 1:
        raise ConfigError(f"need num_steps >= 1, got {num_steps}")
    if not 0 < end <= 1:
        raise ConfigError(f"expected an end of the time grid in (0, 1], got {end:g}")
    return torch.linspace(0, end, num_steps + 1, dtype=dtype)


# All grids are on the CPU: arithmetic with single numbers then costs an accelerator nothing.


def levels_of(settings: SamplerConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """The noise levels that the settings describe, see `edm_noise_levels`."""
    return edm_noise_levels(
        settings.num_steps,
        sigma_min=settings.sigma_min,
        sigma_max=settings.sigma_max,
        rho=settings.rho,
        dtype=dtype,
    )


def noisy_times(settings: SamplerConfig, end: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Times of the noisy steps of a path's SDE, where an ODE would go from 0 to `end`.

    The last of the `num_steps` intervals is the step without noise, of its own size, if there is
    one; so there are `num_steps` times, and one more without a last step.
    """
    if settings.last_step == "none":
        return time_grid(settings.num_steps, end=end, dtype=dtype)
    return time_grid(settings.num_steps - 1, end=1 - settings.last_step_size, dtype=dtype)
