"""From the samples of a network to images: as they are, or through the decoder of a latent VAE.

The two latent conventions differ in more than a constant: EDM2 standardises every latent channel
and lets the VAE work on images in [0, 1]; SiT scales all latents by 0.18215, for images in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from merge_rl.core.network import Undrawn, load_exactly
from merge_rl.core.sampling.sampler import signed_levels, unit_levels
from merge_rl.errors import ConfigError, MissingLibraryError

# Mean and standard deviation of the VAE's raw latents over the training images of EDM2, and the
# standard deviation that its networks are trained on.
EDM2_MEAN: Final = (5.81, 3.25, 0.12, -2.15)
EDM2_STD: Final = (4.17, 4.62, 3.71, 3.28)
EDM2_FINAL_STD: Final = 0.5
SIT_SCALE: Final = 0.18215
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHUNK: Final = 4  # a 512 x 512 image takes about 1 GB while it is decoded in float32

# The architecture of Stability's VAE (Rombach et al., 2022, arXiv:2112.10752, f = 8).
SD_VAE: Final[Mapping[str, Any]] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 256,
}
# Published files call the parts of attention as early versions of diffusers did.
RENAMED: Final = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


class Samples:
    """What a network makes is what is compared: points, sequences, latents as they are."""

    def decode(self, latents: Tensor) -> Tensor:
        """The samples themselves, float32."""
        return latents

    levels = decode


class PixelEncoder:
    """Images are the samples: uint8 / 127.5 - 1 and back, as in the official EDM2 pixel models."""

    channels: tuple[int, ...] = (1, 3)
    upscale = 1  # pixels of an image per sample's, along an axis

    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> float32 in [-1, 1]."""
        return images.to(torch.float32) / 127.5 - 1

    def decode(self, latents: Tensor) -> Tensor:
        """float32 (B, C, H, W) -> uint8."""
        return self.levels(latents).to(torch.uint8)

    def levels(self, latents: Tensor) -> Tensor:
        """The same numbers as float32, with a derivative."""
        return signed_levels(latents)


class Decoder(Protocol):
    """What `LatentDecoder` needs of a VAE, such as diffusers' AutoencoderKL."""

    def decode(self, latents: Tensor, /) -> Any:
        """Raw latents (B, C, h, w) -> images (B, 3, H, W), or an object with them as `sample`."""
        ...


class LatentDecoder(nn.Module):
    """Images from the latents of a network, through a VAE: raw = (latents - bias) / scale.

    Args:
        vae: decodes raw latents (B, C, h, w) to (B, 3, H, W); a module is moved along.
        scale, bias: one number a channel, or one for all channels.
        channels: C.
        to_levels: what the VAE returns, float32 -> whole numbers on 0..255, float32.
        chunk: images decoded at once; bounds memory.
        dtype: what the VAE computes in; scaling and rounding are float32 always.
    """

    scale: Tensor
    bias: Tensor

    def __init__(
        self,
        vae: Decoder,
        *,
        scale: Sequence[float],
        bias: Sequence[float] = (0.0,),
        channels: int = 4,
        to_levels: Callable[[Tensor], Tensor] = signed_levels,
        chunk: int = CHUNK,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        # diffusers' own `to` warns about a cast that is meant.
        self.vae = nn.Module.to(vae, dtype) if isinstance(vae, nn.Module) else vae
        self.channels, self.to_levels, self.chunk, self.dtype = (channels,), to_levels, chunk, dtype
        levels = getattr(getattr(vae, "config", None), "block_out_channels", None)
        self.upscale = 2 ** (len(levels) - 1) if levels else None  # None where it is not known
        for name, values in (("scale", scale), ("bias", bias)):
            row = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
            self.register_buffer(name, row)

    def raw(self, latents: Tensor) -> Tensor:
        """Latents of the network -> latents of the VAE, float32."""
        return (latents.to(self.scale.device, torch.float32) - self.bias) / self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) uint8 on the decoder's device.

        Raises ConfigError for latents of another number of channels.
        """
        with torch.no_grad():
            return self.levels(latents).to(torch.uint8)

    def levels(self, latents: Tensor) -> Tensor:
        """The same numbers as float32, with a derivative; `decode` says what is refused."""
        if latents.ndim != 4 or latents.shape[1] not in self.channels:
            expected = f"(B, {self.channels[0]}, h, w)"
            raise ConfigError(f"expected latents {expected}, got {tuple(latents.shape)}")
        return torch.cat([self._decode(part) for part in torch.split(latents, self.chunk)])

    def _decode(self, latents: Tensor) -> Tensor:
        out = self.vae.decode(self.raw(latents).to(self.dtype))
        images: Tensor = getattr(out, "sample", out)
        return self.to_levels(images.float())


def load_edm2_vae(
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    dtype: str = "float32",
    chunk: int = CHUNK,
) -> LatentDecoder:
    """Stability's VAE as EDM2 uses it (Karras et al., 2024, arXiv:2312.02696).

    latents = raw 0.5 / std + bias with bias = -0.5 mean / std, by channel; images in [0, 1].
    `weights` and `config` as in `stability_vae`; `dtype` is float32 or bfloat16.
    """
    # In float32, as the official constants are formed; float64 would differ in the last bit.
    std, mean = torch.tensor(EDM2_STD), torch.tensor(EDM2_MEAN)
    scale = EDM2_FINAL_STD / std
    return LatentDecoder(
        stability_vae(weights, config),
        scale=scale.tolist(),
        bias=(-mean * scale).tolist(),
        to_levels=unit_levels,
        chunk=chunk,
        dtype=require_dtype(dtype),
    )


def load_sit_vae(
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    dtype: str = "float32",
    chunk: int = CHUNK,
) -> LatentDecoder:
    """Stability's VAE as SiT and DiT use it: latents = 0.18215 raw, images in [-1, 1]."""
    vae = stability_vae(weights, config)
    return LatentDecoder(vae, scale=(SIT_SCALE,), chunk=chunk, dtype=require_dtype(dtype))


def require_dtype(name: str) -> torch.dtype:
    """The dtype of that name; ConfigError for any but those a decoder computes in."""
    if name not in DTYPES:
        raise ConfigError(f"expected a decoder dtype of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def stability_vae(weights: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Any:
    """diffusers' AutoencoderKL without its encoder, in evaluation mode.

    Args:
        weights: names as diffusers writes them, now or early on; the encoder's are ignored.
        config: of the weights' `config.json`; the architecture of Stability's VAE if None.

    Raises ConfigError without diffusers and for a config that it does not take, CheckpointError
    for weights that do not fit.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise MissingLibraryError("decoding latents", "diffusers", "latent") from None
    options = {k: v for k, v in (config or SD_VAE).items() if not k.startswith("_")}
    try:
        with Undrawn():
            vae = AutoencoderKL(**options)
    except (TypeError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"the VAE does not take this config: {first}") from None
    del vae.encoder, vae.quant_conv  # 34 of 84 million parameters, of no use here
    known = vae.state_dict()
    given = {name if name in known else _renamed(name): t for name, t in weights.items()}
    load_exactly(
        vae,
        given,
        "Stability's VAE",
        ignored=lambda name: name.startswith(("encoder.", "quant_conv.")),
    )
    return vae.eval().requires_grad_(False)


def _renamed(name: str) -> str:
    for early, current in RENAMED.items():
        name = name.replace(early, current)
    return name
