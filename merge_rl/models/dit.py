"""DiT: the transformer of Peebles & Xie, 2023 (arXiv:2212.09748), which predicts noise."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from merge_rl.core.sampling.steps import StepLevels, denoise, linear_betas
from merge_rl.models.transformer import DiffusionTransformer


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
