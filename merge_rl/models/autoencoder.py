"""From the samples of a network to images: the pixel encoder; latent ones go beside it."""

from __future__ import annotations

import torch
from torch import Tensor


class PixelEncoder:
    """Images are the samples: uint8 / 127.5 - 1 and back, as in the official EDM2 pixel models."""

    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> float32 in [-1, 1]."""
        return images.to(torch.float32) / 127.5 - 1

    def decode(self, latents: Tensor) -> Tensor:
        """float32 (B, C, H, W) -> uint8.

        Rounds down after adding 128, so that encode followed by decode is the identity. NaN is
        mapped to 0: what yields it is caught where it is made, not here.
        """
        return (latents.float() * 127.5 + 128).nan_to_num().clip(0, 255).to(torch.uint8)
