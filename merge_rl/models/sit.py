"""SiT and REPA: transformers that predict the velocity of a path between noise and data."""

from __future__ import annotations

from typing import Final

from torch import Tensor

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
