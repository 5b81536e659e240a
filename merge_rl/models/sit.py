"""SiT, REPA and DiT: transformers on one plan that predict a velocity, or the noise."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from merge_rl.core.sampling.steps import StepLevels, denoise, linear_betas
from merge_rl.models.transformer import DiffusionTransformer


class SiT(DiffusionTransformer):
    """Velocity v(x, t, labels) of the path from noise (t = 0) to data (t = 1).

    Ma et al., 2024 (arXiv:2401.08740). Options: see `DiffusionTransformer`.
    """

    prediction: Final = "velocity"

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Velocity dx/dt of x (B, C, H, H) at time t, one or (B,) values in [0, 1]; float32.

        Labels and errors: see `DiffusionTransformer.run`.
        """
        return self.run(x, t, labels)


class REPA(DiffusionTransformer):
    """A SiT trained with REPA (Yu et al., 2024, arXiv:2410.06940), whose own time runs backwards.

    Its weights know data at 0 and noise at 1, and point from data to noise. The network here is
    asked as SiT is, so that its own time is 1 - t and its velocity changes sign. The projectors of
    the training loss are no part of it.
    """

    prediction: Final = "velocity"

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Velocity dx/dt towards the data, of x (B, C, H, H) at t in [0, 1] (0 = noise); float32.

        Labels and errors: see `DiffusionTransformer.run`.
        """
        return -self.run(x, 1 - t, labels)


class DiT(DiffusionTransformer):
    """The denoised sample D(x; sigma, labels), from noise predicted in 1000 steps of linear betas.

    The published networks learned variances beside the noise (`learn_sigma`), which an ODE has no
    use for. Options: see `DiffusionTransformer`.
    """

    prediction: Final = "denoised"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.levels = StepLevels(linear_betas())

    def noise_levels(self, num_steps: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The levels that DDIM visits, see `StepLevels.ladder`."""
        return self.levels.ladder(num_steps, dtype)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """The denoised sample of x (B, C, H, H) at noise level sigma, 0-dim or (B,); float32.

        Labels and errors: see `DiffusionTransformer.run`.
        """
        return denoise(self.run, self.levels, x, sigma, labels)
