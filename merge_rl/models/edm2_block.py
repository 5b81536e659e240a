"""Blocks of EDM2's U-Net (Karras et al., 2024, arXiv:2312.02696, configuration G)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merge_rl.models.magnitude import NormalizedWeight, mp_silu, mp_sum, normalize, resample


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What all blocks of a U-Net share; the defaults are those of the released networks."""

    resample_filter: tuple[float, ...] = (1, 1)
    channels_per_head: int = 64
    dropout: float = 0.0
    res_balance: float = 0.3  # share of the residual branch
    attn_balance: float = 0.3  # share of the attention branch
    clip_act: float = 256.0


class Block(nn.Module):
    """One encoder or decoder block: (resample), residual branch, (self-attention), clip.

    Encoder: the 1x1 skip convolution and the pixel norm come before the residual branch.
    Decoder: the branch sees the raw input; the skip convolution is on the shortcut alone.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        config: BlockConfig,
        *,
        decoder: bool = False,
        mode: str = "keep",
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.decoder, self.mode = config, decoder, mode
        self.num_heads = out_channels // config.channels_per_head if attention else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        branch_in = in_channels if decoder else out_channels
        self.conv_res0 = NormalizedWeight(branch_in, out_channels, 3)
        self.emb_linear = NormalizedWeight(emb_channels, out_channels)
        self.conv_res1 = NormalizedWeight(out_channels, out_channels, 3)
        self.conv_skip = None
        if in_channels != out_channels:
            self.conv_skip = NormalizedWeight(in_channels, out_channels, 1)
        self.attn_qkv = self.attn_proj = None
        if self.num_heads:
            self.attn_qkv = NormalizedWeight(out_channels, 3 * out_channels, 1)
            self.attn_proj = NormalizedWeight(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = resample(x, self.config.resample_filter, self.mode)
        if not self.decoder:
            x = self.conv_skip(x) if self.conv_skip is not None else x
            x = normalize(x, dims=(1,))
        y = self._residual(x, emb)
        if self.decoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, self.config.res_balance)
        if self.attn_qkv is not None and self.attn_proj is not None:
            y = self.attn_proj(self._attention(self.attn_qkv(x)))
            x = mp_sum(x, y, self.config.attn_balance)
        return x.clip_(-self.config.clip_act, self.config.clip_act)

    def _residual(self, x: Tensor, emb: Tensor) -> Tensor:
        y = self.conv_res0(mp_silu(x))
        modulation = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = mp_silu(y * modulation[:, :, None, None].to(y.dtype))
        if self.training and self.config.dropout:
            y = F.dropout(y, p=self.config.dropout)
        out: Tensor = self.conv_res1(y)
        return out

    def _attention(self, qkv: Tensor) -> Tensor:
        """(B, 3C, H, W) with channels ordered (head, channel, q|k|v) -> (B, C, H, W)."""
        batch, channels, height, width = qkv.shape
        qkv = qkv.reshape(batch, self.num_heads, -1, 3, height * width)
        # Each (B, heads, T, d) with d innermost: the layout that fused attention kernels need.
        q, k, v = normalize(qkv, dims=(2,)).permute(3, 0, 1, 4, 2).contiguous().unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)  # scales by 1 / sqrt(d)
        return out.mT.reshape(batch, channels // 3, height, width)
