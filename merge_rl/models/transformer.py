"""The diffusion transformer: tokens of image patches, modulated by time and class.

The backbone of DiT (Peebles & Xie, 2023, arXiv:2212.09748), of SiT (Ma et al., 2024,
arXiv:2401.08740) and of REPA (Yu et al., 2024, arXiv:2410.06940). Written from the papers and from
published facts; names, order and shapes of the state dict are the official checkpoints'.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merge_rl.core.forms import FREQUENCIES
from merge_rl.core.network import Network
from merge_rl.core.sampling.compatibility import require_class_ids
from merge_rl.errors import ConfigError


def position_table(hidden_size: int, side: int) -> Tensor:
    """Sines and cosines of the tokens' coordinates: (side^2, hidden_size) float32, row by row.

    The first half of the channels is for the column, the second for the row; each half is
    [sin(p w_0), ..., cos(p w_0), ...] with w_k = 10000^(-4 k / hidden_size), in float64.
    """
    quarter = hidden_size // 4
    rates = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64).outer(rates)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, hidden_size / 2)
    columns = line.repeat(side, 1)
    rows = line.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()


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
    """Attention and MLP, each behind a modulated layer norm and in front of a gate (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = layer_norm(hidden_size), layer_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = MLP(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = modulation(hidden_size, 6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens (B, T, D) and conditioning (B, D) to tokens (B, T, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, 1)
        x = torch.addcmul(x, gate1[:, None], self.attn(modulate(self.norm1(x), shift1, scale1)))
        return torch.addcmul(x, gate2[:, None], self.mlp(modulate(self.norm2(x), shift2, scale2)))


class FinalLayer(nn.Module):
    """Modulated layer norm and the linear map to patches (B, T, p p C_out)."""

    def __init__(self, hidden_size: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, outputs)
        self.adaLN_modulation = modulation(hidden_size, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens (B, T, D) and conditioning (B, D) to patches (B, T, p p C_out)."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, 1)
        out: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return out


class DiffusionTransformer(Network):
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

    # A constant that official files store as a parameter: carried by a merge like a buffer.
    fixed_names: Final = ("pos_embed",)

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
        super().__init__()
        for name, whole, part in (
            ("input_size", input_size, patch_size),
            ("hidden_size", hidden_size, num_heads),
            ("hidden_size", hidden_size, 4),  # sines and cosines of two coordinates
        ):
            if part < 1 or whole < 1 or whole % part:
                raise ConfigError(f"expected {name} to be a multiple of {part}, got {whole}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.class_dropout_prob, self.num_classes = class_dropout_prob, num_classes
        side, outputs = input_size // patch_size, (2 if learn_sigma else 1) * in_channels
        table = torch.empty(side * side, hidden_size)
        if not table.is_meta:  # where only shapes matter, arithmetic would load a compiler
            table = position_table(hidden_size, side)
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
        self.t_embedder = TimeEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes + (class_dropout_prob > 0), hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * outputs)
        if not table.is_meta:
            self._initialise()

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, H) of one sample."""
        return (self.in_channels, self.input_size, self.input_size)

    @property
    def label_dim(self) -> int:
        """Number of classes, without the null class."""
        return self.num_classes

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

    def drop_labels(self, labels: Tensor, drop: Tensor) -> Tensor:
        """Labels (B,) with the null class where drop (B,) is true: for training.

        The network never drops labels itself, so that a call is a function of its arguments alone.
        """
        return labels.masked_fill(drop, self._require_null())

    def _ids(self, labels: Tensor | None, x: Tensor) -> Tensor:
        if labels is None:
            return torch.full((len(x),), self._require_null(), device=x.device)
        if labels.shape != x.shape[:1] or labels.is_floating_point():
            raise ConfigError(
                f"expected class ids of shape {tuple(x.shape[:1])} as labels, found "
                f"{str(labels.dtype).removeprefix('torch.')} {tuple(labels.shape)}"
            )
        require_class_ids(labels, self.y_embedder.embedding_table.num_embeddings)
        return labels.to(x.device)

    def _require_null(self) -> int:
        if self.null_label is None:
            raise ConfigError(
                f"this {type(self).__name__} has no null class (its label table has "
                f"{self.num_classes} rows); expected a label for every image and no guidance"
            )
        return self.null_label

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
