"""DINOv2 ViT-L/14 (Oquab et al., 2023, arXiv:2304.07193), for FD-DINOv2, through transformers.

Two extractors share the network and differ in how the image becomes 224 x 224:

    dinov2      EDM2: antialiased bicubic of the float image, neither clipped nor rounded
    dinov2-dgm  the default of dgm-eval (Stein et al., 2023, arXiv:2306.04675): Pillow's bicubic of
                the 8-bit image, rounded to bytes after each direction

Pixels are then scaled to [0, 1] and normalised by ImageNet's mean and standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merge_rl.core.network import load_exactly
from merge_rl.errors import CheckpointError, MissingLibraryError
from merge_rl.features.preparation import (
    ImageFeatures,
    Preparation,
    resize_bicubic,
    resize_bicubic_bytes,
)

SIZE: Final = 224
CHUNK: Final = 32
MEAN: Final = (0.485, 0.456, 0.406)
STD: Final = (0.229, 0.224, 0.225)
VIT_L14: Final[Mapping[str, Any]] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "mlp_ratio": 4,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
}
POSITIONS: Final = "embeddings.position_embeddings"
# transformers 5 calls the parts of attention otherwise than the published file does.
RENAMED: Final = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


class ClassToken(nn.Module):
    """Prepared images (B, 3, 224, 224) -> the class token after the last norm, (B, D)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        token: Tensor = self.network(x).last_hidden_state[:, 0]
        return token


def load_dinov2(
    weights: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> ImageFeatures:
    """Features for FD-DINOv2 as EDM2 computes them, (B, 1024)."""
    return _build(weights, config, "dinov2", prepare_edm2)


def load_dinov2_dgm(
    weights: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> ImageFeatures:
    """Features for FD-DINOv2 as dgm-eval computes them by default, (B, 1024)."""
    return _build(weights, config, "dinov2-dgm", prepare_dgm)


def prepare_edm2(images: Tensor) -> Tensor:
    """Images on 0..255 -> normalised (B, 3, 224, 224)."""
    return normalise(resize_bicubic(images / 255, SIZE))


def prepare_dgm(images: Tensor) -> Tensor:
    """Images on 0..255 -> normalised (B, 3, 224, 224), from whole numbers."""
    return normalise(resize_bicubic_bytes(images, SIZE) / 255)


def normalise(images: Tensor) -> Tensor:
    """(x - mean) / std by channel; one grey channel becomes three."""
    mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def resample_positions(table: Tensor, patches: int) -> Tensor:
    """The position table (1, 1 + n^2, D) for a grid of `patches` x `patches`, bicubic.

    The published network does this with scale factor (patches + 0.1) / n instead of the exact
    ratio, and features depend on it: patch i reads the table at (i + 1/2) n / (patches + 0.1)
    - 1/2, between Keys' cubics with a = -3/4.
    """
    side = math.isqrt(table.shape[1] - 1)
    if table.ndim != 3 or side * side != table.shape[1] - 1:
        raise CheckpointError(
            f"not the weights of DINOv2: {POSITIONS!r} of shape {tuple(table.shape)} is no "
            "class token followed by a square grid"
        )
    if side == patches:
        return table
    grid = table[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factor = (patches + 0.1) / side
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic", align_corners=False)
    flat = grid.permute(0, 2, 3, 1).reshape(1, patches * patches, -1)
    return torch.cat([table[:, :1].float(), flat], 1)


def _build(
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
    name: str,
    prepare: Preparation,
) -> ImageFeatures:
    # At 224 the network takes the table as it is, so that ours, not the library's resampling rules.
    options = {**VIT_L14, **(config or {}), "image_size": SIZE}
    network = _new_network(options, name)
    known, given = network.state_dict(), dict[str, Tensor]()
    for key, tensor in weights.items():
        given[key if key in known else _renamed(key)] = tensor
    if POSITIONS in given:
        given[POSITIONS] = resample_positions(given[POSITIONS], SIZE // options["patch_size"])
    # The mask token is for training alone.
    load_exactly(
        network, given, f"extractor {name!r}", optional=lambda key: key.endswith("mask_token")
    )
    frozen = ClassToken(network).eval().requires_grad_(False)
    return ImageFeatures(frozen, prepare, name=name, dim=options["hidden_size"], chunk=CHUNK)


def _new_network(options: Mapping[str, Any], name: str) -> nn.Module:
    try:
        from transformers import Dinov2Config, Dinov2Model
    except ImportError:
        raise MissingLibraryError(f"the extractor {name!r}", "transformers", "dinov2") from None
    network: nn.Module = Dinov2Model(Dinov2Config(**options))
    return network


def _renamed(key: str) -> str:
    for published, current in RENAMED.items():
        key = key.replace(published, current)
    return key
