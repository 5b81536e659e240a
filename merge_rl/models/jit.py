"""JiT: the transformer on large patches of pixels of Li & He, 2025 (arXiv:2511.13720).

It predicts the data itself. Written from the paper and from published facts; names and shapes of
the state dict are the official checkpoints', without their prefix `net.`.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merge_rl.core.network import rotations
from merge_rl.models.patches import PatchNetwork
from merge_rl.models.transformer import (
    Block,
    FinalLayer,
    LabelEmbedder,
    TimeEmbedder,
    unpatchify,
)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """x (..., T, d) with every pair of channels (a, b) turned to (a c - b s, b c + a s)."""
    first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return x * cosines + turned * sines


class RMSNorm(nn.Module):
    """weight x / sqrt(mean x^2 + 1e-6) over the last axis, in float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return (self.weight * normed).to(x.dtype)


class PatchBottleneck(nn.Module):
    """Images (B, C, H, H) to tokens (B, (H/p)^2, D) through `inner` channels, row by row."""

    def __init__(self, patch_size: int, channels: int, inner: int, hidden_size: int) -> None:
        super().__init__()
        self.proj1 = nn.Conv2d(channels, inner, patch_size, stride=patch_size, bias=False)
        self.proj2 = nn.Conv2d(inner, hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj2(self.proj1(x.to(self.proj1.weight.dtype)))
        return out.flatten(2).mT


class Attention(nn.Module):
    """Self-attention with normalised queries and keys, turned by their tokens' places."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_norm = RMSNorm(hidden_size // num_heads)
        self.k_norm = RMSNorm(hidden_size // num_heads)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        batch, tokens, hidden = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, T, d)
        q, k = (rotate(part, cosines, sines) for part in (self.q_norm(q), self.k_norm(k)))
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(batch, tokens, hidden))
        return projected


class GatedMLP(nn.Module):
    """SwiGLU: silu(a) b for the two halves (a, b) of a linear map, then a linear map back."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(hidden_size, 2 * inner_size)
        self.w3 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(gate) * value)
        return out


class JiT(PatchNetwork):
    """Velocity (D - x) / max(1 - t, 0.05) of the linear path, from the data D that it predicts.

    Args:
        input_size: H; images are (B, C, H, H).
        patch_size: p; H / p tokens a side.
        in_channels: C.
        hidden_size, depth, num_heads, mlp_ratio: D, blocks, heads a block; the MLP has
            int(2/3 int(D mlp_ratio)) channels.
        num_classes: classes; the null class has the row after theirs.
        bottleneck_dim: channels between the two maps of a patch.
        in_context_len, in_context_start: class tokens, and the block before which they join.
        noise_scale: standard deviation of the noise at t = 0.

    Raises ConfigError for sizes that do not divide as they must.
    """

    prediction: Final = "velocity"
    open_end: Final = True  # 1 - t is bounded, so that the velocity is wrong at t = 1 itself

    def __init__(
        self,
        *,
        input_size: int = 256,
        patch_size: int = 16,
        in_channels: int = 3,
        hidden_size: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        bottleneck_dim: int = 128,
        in_context_len: int = 32,
        in_context_start: int = 4,
        noise_scale: float = 1.0,
    ) -> None:
        super().__init__(
            input_size=input_size, patch_size=patch_size, in_channels=in_channels,
            hidden_size=hidden_size, num_classes=num_classes,
            parts=(4 * num_heads,),  # pairs of channels of two coordinates
        )  # fmt: skip
        self.noise_scale, self.in_context_len = noise_scale, in_context_len
        self.in_context_start = in_context_start
        side, head_size = input_size // patch_size, hidden_size // num_heads
        self.cosines: Tensor
        self.sines: Tensor
        turns = torch.empty(2, side * side + in_context_len, head_size)
        cosines, sines = turns if turns.is_meta else rotations(head_size, side, in_context_len)
        self.register_buffer("cosines", cosines, persistent=False)
        self.register_buffer("sines", sines, persistent=False)
        if in_context_len:
            self.in_context_posemb = nn.Parameter(torch.empty(1, in_context_len, hidden_size))
        self.t_embedder = TimeEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes + 1, hidden_size)
        self.x_embedder = PatchBottleneck(patch_size, in_channels, bottleneck_dim, hidden_size)
        inner = int(int(hidden_size * mlp_ratio) * 2 / 3)
        self.blocks = nn.ModuleList(
            Block(
                hidden_size,
                Attention(hidden_size, num_heads),
                GatedMLP(hidden_size, inner),
                RMSNorm,
            )
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels, RMSNorm)
        if in_context_len and not turns.is_meta:
            nn.init.normal_(self.in_context_posemb, std=0.02)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Velocity dx/dt of x (B, C, H, H) at time t, one or (B,) values in [0, 1]; float32.

        Labels are class ids (B,) int64, the null class among them, which is None for all. Raises
        ConfigError for labels out of range.
        """
        left = (1 - t.float()).clamp_min(0.05).reshape(-1, *[1] * (x.ndim - 1))
        return (self.data(x, t, labels) - x.float()) / left

    def data(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The data (B, C, H, H) that x at time t is expected to come from; float32."""
        named = self.y_embedder(self._ids(labels, x))
        condition = self.t_embedder(t.reshape(-1)) + named
        tokens = self.x_embedder(x) + self.pos_embed
        others = self.in_context_len
        for index, block in enumerate(self.blocks):
            if index == self.in_context_start and others:
                tokens = torch.cat([named[:, None] + self.in_context_posemb, tokens], dim=1)
            tokens = block(tokens, condition, *self._turns(tokens.shape[1]))
        out = self.final_layer(tokens[:, tokens.shape[1] - self.pos_embed.shape[1] :], condition)
        return unpatchify(out, self.patch_size).float()

    def _turns(self, count: int) -> tuple[Tensor, Tensor]:
        """Rotations of the last `count` tokens: those of the image come last."""
        return self.cosines[-count:], self.sines[-count:]
