"""Encoders of images that transformers builds: ConvNeXt V2, MAE, SigLIP, CLIP, DINOv3.

    convnextv2  mean of the last map, normalised   facebook/convnextv2-base-22k-224
    mae         class token, no patch masked       facebook/vit-mae-large
    siglip      the attention-pooled vector        google/siglip-base-patch16-224
    clip        the projected image embedding      openai/clip-vit-large-patch14
    dinov3      class token after the last norm    facebook/dinov3-vitl16-pretrain-lvd1689m

Images are prepared as each model's own processor prepares square ones: resized with antialiasing,
cropped where it crops, scaled to [0, 1] and normalised; here neither clipped nor rounded between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merge_rl.errors import CheckpointError, MissingLibraryError
from merge_rl.features.dinov2 import MEAN, STD
from merge_rl.features.preparation import ImageFeatures

SIZE: Final = 224
CHUNK: Final = 32
_LARGE: Final[Mapping[str, Any]] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": SIZE,
}  # fmt: skip
_HALF: Final = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """One network: its classes in transformers, its options, its pooled output, its images."""

    model: str
    config: str
    options: Mapping[str, Any]
    output: str
    dim: int
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    mode: str = "bicubic"
    resized: int = SIZE  # before the middle is cut out
    left: tuple[str, ...] = ()  # tensors of the published file that the network has no use for


ENCODERS: Final[Mapping[str, Encoder]] = {
    "convnextv2": Encoder(
        model="ConvNextV2Model", config="ConvNextV2Config", output="pooler_output", dim=1024,
        options={"depths": [3, 3, 27, 3], "hidden_sizes": [128, 256, 512, 1024]}, resized=256,
        left=("classifier.",),
    ),
    "mae": Encoder(
        model="ViTMAEModel", config="ViTMAEConfig", output="last_hidden_state", dim=1024,
        options={**_LARGE, "patch_size": 16, "mask_ratio": 0.0}, mode="bilinear",
        left=("decoder.",),
    ),
    "siglip": Encoder(
        model="SiglipVisionModel", config="SiglipVisionConfig", output="pooler_output", dim=768,
        options={
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "image_size": SIZE, "patch_size": 16,
        },
        mean=_HALF, std=_HALF, left=("text_model.", "logit_"),
    ),
    "clip": Encoder(
        model="CLIPVisionModelWithProjection", config="CLIPVisionConfig", output="image_embeds",
        dim=768, options={**_LARGE, "patch_size": 14, "projection_dim": 768},
        mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711),
        left=("text_model.", "text_projection.", "logit_scale"),
    ),
    "dinov3": Encoder(
        model="DINOv3ViTModel", config="DINOv3ViTConfig", output="pooler_output", dim=1024,
        options={**_LARGE, "patch_size": 16, "num_register_tokens": 4}, mode="bilinear",
    ),
}  # fmt: skip


class Pooled(nn.Module):
    """Prepared images (B, 3, S, S) -> one vector each, (B, D)."""

    def __init__(self, network: nn.Module, encoder: Encoder) -> None:
        super().__init__()
        self.network, self.encoder = network, encoder

    def forward(self, x: Tensor) -> Tensor:
        given: dict[str, Tensor] = {}
        if self.encoder.model == "ViTMAEModel":  # which draws an order of the patches otherwise
            config: Any = self.network.config
            count = (config.image_size // config.patch_size) ** 2
            order = torch.arange(count, device=x.device, dtype=x.dtype)
            given["noise"] = order.expand(len(x), -1)
        found: Tensor = getattr(self.network(pixel_values=x, **given), self.encoder.output)
        return found[:, 0] if found.ndim == 3 else found


def prepare(images: Tensor, encoder: Encoder, size: int = SIZE) -> Tensor:
    """Images on 0..255 -> what the network takes, (B, 3, size, size)."""
    side = round(encoder.resized * size / SIZE)
    whole = F.interpolate(
        images / 255, (side, side), mode=encoder.mode, align_corners=False, antialias=True
    )
    edge = (side - size) // 2
    middle = whole[:, :, edge : edge + size, edge : edge + size]
    mean, std = (images.new_tensor(row).view(1, 3, 1, 1) for row in (encoder.mean, encoder.std))
    return (middle - mean) / std


def load_encoder(
    name: str, weights: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> ImageFeatures:
    """The named encoder with weights under the names that any version of the library has written.

    `config` are options of another size. Raises MissingLibraryError without transformers,
    CheckpointError for weights that do not fit.
    """
    encoder = ENCODERS[name]
    try:
        import transformers
    except ImportError:
        raise MissingLibraryError(f"the extractor {name!r}", "transformers", "dinov2") from None
    options = {**encoder.options, **(config or {})}
    built = getattr(transformers, encoder.config)(**options)
    kind = getattr(transformers, encoder.model)
    logs = transformers.utils.logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity(logs.CRITICAL)
    logs.disable_progress_bar()
    try:
        network, said = kind.from_pretrained(
            None, config=built, state_dict=dict(weights), output_loading_info=True
        )
    except (RuntimeError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise CheckpointError(f"extractor {name!r}: not its weights: {why}") from None
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()
    odd = sorted(said["missing_keys"])
    odd += sorted(key for key in said["unexpected_keys"] if not _known(key, encoder))
    if odd:
        raise CheckpointError(
            f"extractor {name!r}: {len(odd)} tensors are missing or not its own, first {odd[0]!r}"
        )
    size = int(getattr(built, "image_size", SIZE)) if "image_size" in options else SIZE
    frozen = Pooled(network.float().eval().requires_grad_(False), encoder)
    dim = options.get("projection_dim") or options.get("hidden_size") or options["hidden_sizes"][-1]
    prepared: Callable[[Tensor], Tensor] = partial(prepare, encoder=encoder, size=size)
    return ImageFeatures(frozen, prepared, name=name, dim=int(dim), chunk=CHUNK)


def _known(key: str, encoder: Encoder) -> bool:
    return key.startswith(encoder.left) or key.endswith(("mask_token", "position_ids"))


def load_convnextv2(weights: Mapping[str, Tensor]) -> ImageFeatures:
    """Features (B, 1024) of ConvNeXt V2, base (Woo et al., 2023, arXiv:2301.00808)."""
    return load_encoder("convnextv2", weights)


def load_mae(weights: Mapping[str, Tensor]) -> ImageFeatures:
    """Features (B, 1024) of a masked autoencoder, ViT-L/16 (He et al., 2021, arXiv:2111.06377)."""
    return load_encoder("mae", weights)


def load_siglip(weights: Mapping[str, Tensor]) -> ImageFeatures:
    """Features (B, 768) of SigLIP, ViT-B/16 (Zhai et al., 2023, arXiv:2303.15343)."""
    return load_encoder("siglip", weights)


def load_clip(weights: Mapping[str, Tensor]) -> ImageFeatures:
    """Features (B, 768) of CLIP, ViT-L/14 (Radford et al., 2021, arXiv:2103.00020)."""
    return load_encoder("clip", weights)


def load_dinov3(weights: Mapping[str, Tensor]) -> ImageFeatures:
    """Features (B, 1024) of DINOv3, ViT-L/16 (Simeoni et al., 2025, arXiv:2508.10104)."""
    return load_encoder("dinov3", weights)
