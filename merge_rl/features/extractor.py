"""The shell around a network that makes features: it checks, splits and prepares the images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from merge_rl.errors import StatisticsError

Preparation = Callable[[Tensor], Tensor]
"""Float images (B, C, H, W) on the scale 0..255 -> what the network takes, C unchanged or 3."""


class ImageFeatures(nn.Module):
    """A feature extractor: uint8 images (B, 1 or 3, H, W) -> features (B, dim) float32.

    Args:
        network: prepared RGB images -> features.
        prepare: resizing and scaling.
        name: of network and preparation together; statistics are compared by it.
        dim: features an image.
        chunk: images that go through the network at once; bounds memory, changes no result
            beyond rounding.

    Grey images are repeated to RGB. Works where the network's parameters are. Raises
    StatisticsError for images of another dtype, shape or number of channels.
    """

    def __init__(
        self, network: nn.Module, prepare: Preparation, *, name: str, dim: int, chunk: int
    ) -> None:
        super().__init__()
        self.network, self.prepare = network, prepare
        self.name, self.dim, self.chunk = name, dim, chunk

    def forward(self, images: Tensor) -> Tensor:
        require_images(images, self.name)
        like = next(self.network.parameters())
        parts = [images.new_zeros(0, self.dim, dtype=torch.float32, device=like.device)]
        for part in torch.split(images, self.chunk):
            prepared = self.prepare(part.to(like.device).to(like.dtype))
            # After resizing, which is per channel: a third of the work for grey images.
            parts.append(self.network(prepared.expand(-1, 3, -1, -1)).float())
        return torch.cat(parts)


def require_images(images: Tensor, name: str) -> None:
    """Raise StatisticsError unless `images` are uint8 (B, 1 or 3, H, W)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        kind = str(images.dtype).removeprefix("torch.")
        raise StatisticsError(
            f"extractor {name!r}: expected uint8 images (B, 1 or 3, H, W), "
            f"got {kind} {tuple(images.shape)}"
        )
