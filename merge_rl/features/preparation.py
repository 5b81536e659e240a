"""Resizing images as the public metric implementations do; each of them does it differently.

All functions take float images (B, C, H, W) and return (B, C, size, size) of the same dtype. They
always resample, on any device; an image that has the size already comes back as it was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merge_rl.core.sampling.sampler import rounded_down
from merge_rl.errors import StatisticsError


def resize_bilinear(images: Tensor, size: int) -> Tensor:
    """Bilinear between pixel centres, no antialiasing: what pytorch-fid does.

    Output i lies at source coordinate (i + 1/2) in / out - 1/2.
    """
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False)


def resize_tf1(images: Tensor, size: int) -> Tensor:
    """Bilinear as TensorFlow 1 resized, inside the graph that defined FID.

    Output i lies at source coordinate i in / out: pixel corners instead of centres, so that the
    image moves by up to half a pixel. Neighbours past the edge are the edge; x goes before y.
    """
    rows, columns = (_corner_grid(n, size, images) for n in images.shape[-2:])
    images = _blend(images, 3, *columns)
    return _blend(images, 2, rows[0], rows[1], rows[2][:, None])


def resize_bicubic(images: Tensor, size: int) -> Tensor:
    """Bicubic with antialiasing, neither clipped nor rounded: the kernel Pillow uses (a = -1/2)."""
    return F.interpolate(images, (size, size), mode="bicubic", align_corners=False, antialias=True)


def resize_bicubic_bytes(images: Tensor, size: int) -> Tensor:
    """What Pillow's bicubic gives for 8-bit images on the scale 0..255: whole numbers.

    Pillow rounds and clips twice, after resampling along x and again after y. Derivatives go
    straight through the rounding.
    """
    for shape in ((images.shape[2], size), (size, size)):
        images = F.interpolate(images, shape, mode="bicubic", align_corners=False, antialias=True)
        images = rounded_down(images + 0.5).clamp(0, 255)
    return images


def _corner_grid(length: int, size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lower neighbour, upper neighbour, and the weight of the upper one, (size,) each."""
    # TensorFlow computed scale and coordinate in float32; float64 would move a weight by 1e-5.
    scale = torch.tensor(float(length), dtype=torch.float32, device=like.device) / size
    source = torch.arange(size, dtype=torch.float32, device=like.device) * scale
    lower = source.floor().long().clamp(max=length - 1)
    return lower, (lower + 1).clamp(max=length - 1), (source - lower).to(like.dtype)


def _blend(images: Tensor, dim: int, lower: Tensor, upper: Tensor, weight: Tensor) -> Tensor:
    low = images.index_select(dim, lower)
    return low + (images.index_select(dim, upper) - low) * weight


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
        """Features (B, D) float32 of uint8 images (B, 1 or 3, H, W), on the network's device."""
        require_images(images, self.name)
        like = next(self.network.parameters())
        parts = [images.new_zeros(0, self.dim, dtype=torch.float32, device=like.device)]
        for part in torch.split(images, self.chunk):
            prepared = self.prepare(part.to(like.device).to(like.dtype))
            # After resizing, which is per channel: a third of the work for grey images.
            parts.append(self.network(prepared.expand(-1, 3, -1, -1)).float())
        return torch.cat(parts)


def require_images(images: Tensor, name: str) -> None:
    """Raise StatisticsError unless `images` are uint8 (B, 1 or 3, H, W).

    Where a gradient is wanted, which bytes cannot have, they are whole numbers of a floating dtype.
    """
    if (
        (images.dtype != torch.uint8 and not images.requires_grad)
        or images.ndim != 4
        or images.shape[1] not in (1, 3)
    ):
        kind = str(images.dtype).removeprefix("torch.")
        raise StatisticsError(
            f"extractor {name!r}: expected uint8 images (B, 1 or 3, H, W), "
            f"got {kind} {tuple(images.shape)}"
        )
