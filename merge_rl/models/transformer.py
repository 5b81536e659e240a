"""The diffusion transformer: tokens of image patches, modulated by time and class.

The backbone of DiT (Peebles & Xie, 2023, arXiv:2212.09748), of SiT (Ma et al., 2024,
arXiv:2401.08740) and of REPA (Yu et al., 2024, arXiv:2410.06940). Written from the papers and from
published facts; names, order and shapes of the state dict are the official checkpoints'.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merge_rl.core.forms import FREQUENCIES
from merge_rl.models.patches import PatchNetwork


def time_frequencies(t: Tensor) -> Tensor:
    """[cos(t f_0..127), sin(t f_0..127)] of times t (B,): (B, 256) float32.

    f_k = 10000^(-k / 128). Times are taken as they come (0..1, or steps); the cosines come first.
    """
    half = FREQUENCIES // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def unpatchify(tokens: Tensor, patch_size: int) -> Tensor:
    """Tokens (B, n^2, p p C), each ordered (row, column, channel), to images (B, C, n p, n p)."""
    batch, count, width = tokens.shape
    side, channels = math.isqrt(count), width // patch_size**2
    x = tokens.reshape(batch, side, side, patch_size, patch_size, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, side * patch_size, -1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, with vectors (B or 1, D) for all tokens of x (B, T, D)."""
    return torch.addcmul(x + shift[:, None], x, scale[:, None])


class PatchEmbedder(nn.Module):
    """Images (B, C, H, H) to tokens (B, (H/p)^2, D), row by row."""

    def __init__(self, patch_size: int, channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x.to(self.proj.weight.dtype))
        return out.flatten(2).mT


class TimeEmbedder(nn.Module):
    """Times (B,) to vectors (B, D)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        first, second = nn.Linear(FREQUENCIES, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, t: Tensor) -> Tensor:
        # Waves are made in float32: half precision would lose the fast ones.
        out: Tensor = self.mlp(time_frequencies(t).to(next(self.parameters()).dtype))
        return out


class LabelEmbedder(nn.Module):
    """Class ids (B,) to vectors (B, D); the last row may be the null class."""

    def __init__(self, rows: int, hidden_size: int) -> None:
        super().__init__()
        empty = torch.empty(rows, hidden_size)
        given = empty if empty.is_meta else None  # drawing there would load a compiler
        self.embedding_table = nn.Embedding(rows, hidden_size, _weight=given)

    def forward(self, labels: Tensor) -> Tensor:
        out: Tensor = self.embedding_table(labels)
        return out


class Attention(nn.Module):
    """Self-attention over tokens (B, T, D); `qkv` is ordered (q|k|v, head, channel)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) to tokens (B, T, D)."""
        batch, tokens, hidden = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, T, d)
        out = F.scaled_dot_product_attention(q, k, v)  # scales by 1 / sqrt(d)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(batch, tokens, hidden))
        return projected


class MLP(nn.Module):
    """Linear, GELU in its tanh approximation, linear."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


def modulation(hidden_size: int, vectors: int) -> nn.Sequential:
    """The layers that turn the conditioning (B, D) into `vectors` vectors side by side."""
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, vectors * hidden_size))


def layer_norm(hidden_size: int) -> nn.LayerNorm:
    return nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)


class Block(nn.Module):
    """Attention and MLP, each behind a modulated norm and in front of a gate (adaLN-Zero)."""

    def __init__(
        self,
        hidden_size: int,
        attn: nn.Module,
        mlp: nn.Module,
        norm: Callable[[int], nn.Module] = layer_norm,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(hidden_size), norm(hidden_size)
        self.attn, self.mlp = attn, mlp
        self.adaLN_modulation = modulation(hidden_size, 6)

    def forward(self, x: Tensor, condition: Tensor, *places: Tensor) -> Tensor:
        """Tokens (B, T, D) and conditioning (B, D) to tokens; `places` are for the attention."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, 1)
        seen = self.attn(modulate(self.norm1(x), shift1, scale1), *places)
        x = torch.addcmul(x, gate1[:, None], seen)
        return torch.addcmul(x, gate2[:, None], self.mlp(modulate(self.norm2(x), shift2, scale2)))


class FinalLayer(nn.Module):
    """Modulated norm and the linear map to patches (B, T, p p C_out)."""

    def __init__(
        self, hidden_size: int, outputs: int, norm: Callable[[int], nn.Module] = layer_norm
    ) -> None:
        super().__init__()
        self.norm_final = norm(hidden_size)
        self.linear = nn.Linear(hidden_size, outputs)
        self.adaLN_modulation = modulation(hidden_size, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens (B, T, D) and conditioning (B, D) to patches (B, T, p p C_out)."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, 1)
        out: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return out


class DiffusionTransformer(PatchNetwork):
    """Patches through blocks to patches; what the output means, its subclasses say.

    Args:
        input_size: H; images or latents are (B, C, H, H).
        patch_size: p; H / p tokens a side.
        in_channels: C.
        hidden_size, depth, num_heads, mlp_ratio: D, blocks, heads a block, MLP width over D.
        class_dropout_prob: share of labels that training replaces by the null class; above 0 the
            label table has a row for it, after those of the classes.
        num_classes: classes, without the null class.
        learn_sigma: the last layer has twice the channels; the second half is not used.

    Raises ConfigError for sizes that do not divide as they must.
    """

    def __init__(
        self,
        *,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__(
            input_size=input_size, patch_size=patch_size, in_channels=in_channels,
            hidden_size=hidden_size, num_classes=num_classes,
            parts=(num_heads, 4),  # heads; sines and cosines of two coordinates
        )  # fmt: skip
        self.class_dropout_prob = class_dropout_prob
        outputs, inner = (2 if learn_sigma else 1) * in_channels, int(hidden_size * mlp_ratio)
        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
        self.t_embedder = TimeEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes + (class_dropout_prob > 0), hidden_size)
        self.blocks = nn.ModuleList(
            Block(hidden_size, Attention(hidden_size, num_heads), MLP(hidden_size, inner))
            for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * outputs)
        if not self.pos_embed.is_meta:
            self._initialise()

    @property
    def null_label(self) -> int | None:
        """The label that means "no class"; None where the network has no such row."""
        return self.num_classes if self.class_dropout_prob > 0 else None

    def run(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """Output (B, C, H, H) for x of that shape at time t, one or (B,) values; float32.

        Labels are class ids (B,) int64, the null class among them. None is the null class for all;
        ConfigError where the network has none, and for labels out of range.
        """
        condition = self.t_embedder(t.reshape(-1)) + self.y_embedder(self._ids(labels, x))
        tokens = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens, condition)
        out = unpatchify(self.final_layer(tokens, condition), self.patch_size)
        return out[:, : self.in_channels].float()

    def _initialise(self) -> None:
        """As training starts: every block is the identity and the output is 0."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if not isinstance(module, (nn.Linear, nn.Conv2d)):
                continue
            if name.startswith("t_embedder"):
                nn.init.normal_(module.weight, std=0.02)
            elif "adaLN_modulation" in name or name == "final_layer.linear":
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
