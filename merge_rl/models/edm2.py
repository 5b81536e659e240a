"""EDM2: the magnitude-preserving U-Net denoiser of Karras et al., 2024 (arXiv:2312.02696).

Written from the paper and from published facts about the released networks. State-dict names,
order and shapes equal those of the official checkpoints, so that files travel both ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merge_rl.core.network import Network
from merge_rl.core.sampling.compatibility import require_class_ids
from merge_rl.models.edm2_layers import (
    Block,
    BlockConfig,
    FourierFeatures,
    NormalizedWeight,
    Once,
    arranged,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
)


class UNet(nn.Module):
    """F(x, c_noise, labels): (B, C, R, R) -> (B, C, R, R); no biases, no normalisation layers."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        **block_options: Any,
    ) -> None:
        super().__init__()
        self.label_balance, self.concat_balance = label_balance, concat_balance
        widths = [model_channels * m for m in channel_mult]
        noise_channels = model_channels * (channel_mult_noise or channel_mult[0])
        emb_channels = model_channels * (channel_mult_emb or max(channel_mult))
        block_options["resample_filter"] = tuple(block_options.get("resample_filter", (1, 1)))
        config = BlockConfig(**block_options)
        if len(config.resample_filter) % 2 or not sum(config.resample_filter):
            found = list(config.resample_filter)
            raise ValueError(f"expected a resample_filter of even length, sum not 0, got {found}")

        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = FourierFeatures(noise_channels)
        self.emb_noise = NormalizedWeight(noise_channels, emb_channels)
        self.emb_label = NormalizedWeight(label_dim, emb_channels) if label_dim else None
        levels = [(img_resolution >> i, width) for i, width in enumerate(widths)]
        self.enc = nn.ModuleDict()
        self.dec = nn.ModuleDict()
        # Every block takes (in, out, **kind); the rest is common to the whole network.
        block = partial(Block, emb_channels=emb_channels, config=config)
        attention = set(attn_resolutions)
        skips = self._build_encoder(block, levels, img_channels, num_blocks, attention)
        self._build_decoder(block, levels, skips, num_blocks, attention)
        self.out_conv = NormalizedWeight(widths[0], img_channels, 3)

    def _build_encoder(
        self,
        block: Callable[..., Block],
        levels: list[tuple[int, int]],
        img_channels: int,
        num_blocks: int,
        attention: set[int],
    ) -> list[int]:
        """Add the encoder; returns the width of every skip connection, in order."""
        width = levels[0][1]
        skips: list[int] = []
        for level, (res, level_width) in enumerate(levels):
            if level == 0:  # one more input channel: a constant plane of ones
                self.enc[f"{res}x{res}_conv"] = NormalizedWeight(img_channels + 1, width, 3)
            else:
                self.enc[f"{res}x{res}_down"] = block(width, width, mode="down")
            skips.append(width)
            for i in range(num_blocks):
                name = f"{res}x{res}_block{i}"
                self.enc[name] = block(width, level_width, attention=res in attention)
                width = level_width
                skips.append(width)
        return skips

    def _build_decoder(
        self,
        block: Callable[..., Block],
        levels: list[tuple[int, int]],
        skips: list[int],
        num_blocks: int,
        attention: set[int],
    ) -> None:
        """Add the decoder, lowest level first; uses up the skip widths, last in first out."""
        block = partial(block, decoder=True)
        width = levels[-1][1]
        for level, (res, level_width) in reversed(list(enumerate(levels))):
            prefix = f"{res}x{res}"
            if level == len(levels) - 1:  # in0 has attention at every resolution
                self.dec[f"{prefix}_in0"] = block(width, width, attention=True)
                self.dec[f"{prefix}_in1"] = block(width, width)
            else:
                self.dec[f"{prefix}_up"] = block(width, width, mode="up")
            for i in range(num_blocks + 1):
                inputs = width + skips.pop()
                self.dec[f"{prefix}_block{i}"] = block(
                    inputs, level_width, attention=res in attention
                )
                width = level_width

    def embed(self, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        """Embedding (B or 1, cemb) of the noise level and, where the network has them, labels."""
        emb: Tensor = self.emb_noise(self.emb_fourier(c_noise))
        if self.emb_label is not None and labels is not None:
            # sqrt(K) makes a one-hot row unit rms.
            label_emb = self.emb_label(labels * math.sqrt(labels.shape[1]))
            emb = mp_sum(emb, label_emb, self.label_balance)
        return mp_silu(emb)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        """F(x, c_noise, labels) before preconditioning: x (B, C, H, W), labels (B, K) or None."""
        emb = self.embed(c_noise, labels)
        x = arranged(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
        skips = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, Block) else block(x)
            skips.append(x)
        for name, block in self.dec.items():
            if "block" in name:
                x = mp_cat(x, skips.pop(), self.concat_balance)
            x = block(x, emb)
        out: Tensor = self.out_conv(x, gain=self.out_gain)
        return out


class EDM2(Network):
    """Preconditioned denoiser D(x; sigma, labels) (arXiv:2312.02696, equation 1 and table 1).

        D = c_skip x + c_out F(c_in x, ln(sigma) / 4, labels)

    Args:
        img_resolution: R; images or latents are (B, C, R, R).
        img_channels: C.
        label_dim: number of classes K; 0 for an unconditional network, which ignores labels.
        use_fp16: run the image path in float16 on a GPU (on the CPU all is float32).
        sigma_data: standard deviation of the training data.
        logvar_channels: width of the uncertainty head of the training loss.
        patch_size: p; the U-Net sees p x p pixels as p² channels at resolution R / p. Official
            networks have 1; more makes small networks of large images affordable.
        unet_options: constructor options of the U-Net and its blocks.
    """

    prediction: Final = "denoised"
    capturable = True
    # Of the training loss alone: nothing that is sampled depends on it.
    loss_modules: Final = ("logvar_linear",)

    def __init__(
        self,
        *,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        use_fp16: bool = True,
        sigma_data: float = 0.5,
        logvar_channels: int = 128,
        patch_size: int = 1,
        **unet_options: Any,
    ) -> None:
        super().__init__()
        if img_resolution % patch_size:
            raise ValueError(f"img_resolution {img_resolution} is no multiple of {patch_size}")
        if not sigma_data > 0:
            raise ValueError(f"expected sigma_data > 0, got {sigma_data}")
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.patch_size = patch_size
        self.label_dim, self.use_fp16, self.sigma_data = label_dim, use_fp16, sigma_data
        self.half_on: tuple[str, ...] = ("cuda",)
        resolution, channels = img_resolution // patch_size, img_channels * patch_size**2
        self.unet = UNet(resolution, channels, label_dim, **unet_options)
        self.logvar_fourier = FourierFeatures(logvar_channels)
        self.logvar_linear = NormalizedWeight(logvar_channels, 1)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, R, R) of one sample."""
        return (self.img_channels, self.img_resolution, self.img_resolution)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Denoise x (B, C, R, R) at noise level sigma, one or (B,) values > 0; returns float32.

        Labels are class ids (B,) int64 or soft rows (B, K) float. None is an all-zero row.
        ConfigError for class ids out of range, on the CPU.
        """
        x = x.float()
        sigma = sigma.float().reshape(-1, 1, 1, 1)
        total = sigma.square() + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        c_out = sigma * self.sigma_data / total.sqrt()
        dtype = torch.float16 if self.use_fp16 and x.device.type in self.half_on else torch.float32
        c_noise = (sigma.log() / 4).reshape(-1)
        patches = F.pixel_unshuffle((x / total.sqrt()).to(dtype), self.patch_size)
        out = self.unet(patches, c_noise, self._label_rows(labels, x.device))
        denoised: Tensor = c_skip * x + c_out * F.pixel_shuffle(out, self.patch_size).float()
        return denoised

    def kept(self) -> list[Tensor]:
        """The effective weights of all layers that have made theirs."""
        with torch.no_grad():
            return [weight for layer in self._layers() if (weight := layer.renewed()) is not None]

    @contextmanager
    def derived_once(self) -> Iterator[None]:
        """Inside, all calls with gradients share each layer's effective weight."""
        once = Once()
        try:
            for layer in self._layers():
                layer.once = once
            yield
            once.take_back()
        finally:
            for layer in self._layers():
                layer.once = None

    def _layers(self) -> list[NormalizedWeight]:
        return [layer for layer in self.modules() if isinstance(layer, NormalizedWeight)]

    def normalize_weights(self) -> None:
        """Bring the rows of all weights to unit magnitude, in place: after every training step.

        The paper's forced weight normalization (arXiv:2312.02696, section 2.3). What the network
        computes stays the same, to the 1e-4 of `normalize`; the size of a step relative to its
        weight does too, whatever the number of steps. Evaluation mode is the mode to train in
        with it: dropout would make an image no function of its noise.
        """
        with torch.no_grad():
            for layer in self._layers():
                layer.weight.copy_(normalize(layer.weight.float()))

    def logvar(self, sigma: Tensor) -> Tensor:
        """u(sigma) (B, 1, 1, 1): log variance of the training loss."""
        c_noise = (sigma.float().log() / 4).reshape(-1)
        u: Tensor = self.logvar_linear(self.logvar_fourier(c_noise))
        return u.reshape(-1, 1, 1, 1)

    def _label_rows(self, labels: Tensor | None, device: torch.device) -> Tensor | None:
        if not self.label_dim:
            return None
        if labels is None:
            return torch.zeros(1, self.label_dim, device=device)
        if labels.ndim == 1:
            require_class_ids(labels, self.label_dim)
            return F.one_hot(labels.to(device), self.label_dim).float()
        return labels.to(device, torch.float32).reshape(-1, self.label_dim)
