"""Noise levels and time grids."""

from __future__ import annotations

import torch
from torch import Tensor

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
