"""Magnitude-preserving building blocks of EDM2 (Karras et al., 2024, arXiv:2312.02696).

Every operation keeps the expected root mean square of its input, so that activations and weights
stay at unit scale without any data-dependent normalisation layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merge_rl.core.network import against

EPSILON = 1e-4  # added to the rms itself, neither under the root nor as a lower bound
SILU_RMS = 0.596  # rms of silu(x) for x ~ Normal(0, 1), the rounded constant of the release

Gain: TypeAlias = Tensor | float


def normalize(x: Tensor, dims: Sequence[int] | None = None) -> Tensor:
    """Scale slices of `x` to unit magnitude: x / (1e-4 + rms(x)).

    Args:
        x: any shape, any floating dtype; the rms is taken in float32 and cast back to x.dtype.
        dims: axes of one slice; by default all but the first.
    """
    dims = tuple(range(1, x.ndim)) if dims is None else tuple(dims)
    count = math.prod([x.shape[d] for d in dims])  # a list: compilers know no generators
    # Not linalg.vector_norm: over a strided axis it is many times slower on the CPU.
    rms = (x.float().square().sum(dims, keepdim=True) / count).sqrt()
    return x / (rms + EPSILON).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """silu(x) / 0.596, of unit rms for x ~ Normal(0, 1)."""
    return F.silu(x).div_(SILU_RMS)  # in place: one pass over memory less


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """((1 - t) a + t b) / sqrt((1 - t)^2 + t^2): unit rms for independent a, b of unit rms."""
    first, second = shares(t)
    return (a * first).add(b, alpha=second)


def shares(t: float) -> tuple[float, float]:
    """The factors of a and b in their magnitude-preserving sum, see `mp_sum`."""
    length = math.hypot(1 - t, t)
    return (1 - t) / length, t / length


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Concatenate (B, Na, H, W) and (B, Nb, H, W) so that b has the share t of the variance."""
    na, nb = a.shape[1], b.shape[1]
    scale = math.sqrt((na + nb) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(na)), b * (scale * t / math.sqrt(nb))], 1)


def resample(x: Tensor, taps: Sequence[float], mode: str) -> Tensor:
    """Halve ("down"), double ("up") or keep ("keep") the resolution of (B, C, H, W).

    The filter is the outer product of `taps`, normalised to sum 1 (times 4 when doubling).
    """
    if mode == "keep":
        return x
    if len(taps) == 2 and taps[0] == taps[1]:  # the released models: plain pooling and doubling
        return F.avg_pool2d(x, 2) if mode == "down" else F.interpolate(x, scale_factor=2.0)
    pad = (len(taps) - 1) // 2
    line = torch.tensor(taps, dtype=torch.float32, device=x.device)
    kernel = (line.outer(line) / line.sum().square()).to(x.dtype)
    kernel = kernel.expand(x.shape[1], 1, -1, -1)
    if mode == "down":
        return F.conv2d(x, kernel, groups=x.shape[1], stride=2, padding=pad)
    return F.conv_transpose2d(x, kernel * 4, groups=x.shape[1], stride=2, padding=pad)


def arranged(x: Tensor) -> Tensor:
    """(B, C, H, W) in the order in which the device convolves it fastest.

    Channels innermost on a CPU: half the time for the few channels of small networks. One image
    stays as it is: kernels for it, and how they round, depend on the order of its gradient.
    """
    last = x.device.type == "cpu" and len(x) > 1
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


class FourierFeatures(nn.Module):
    """sqrt(2) cos(v * freqs + phases) of scalars v (B,) -> (B, C), in float32.

    The buffers already hold the factor 2 pi and belong to the checkpoint: two runs with different
    draws see noise levels through different eyes and cannot be merged.
    """

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", _draw(lambda n: 2 * math.pi * torch.randn(n), channels))
        self.register_buffer("phases", _draw(lambda n: 2 * math.pi * torch.rand(n), channels))

    def forward(self, v: Tensor) -> Tensor:
        """Scalars (B,) to (B, C): sqrt(2) cos(v f + p), computed in float32."""
        angle = v.float().outer(self.freqs.float()) + self.phases.float()
        return (angle.cos() * math.sqrt(2)).to(v.dtype)


class Once:
    """Values that many calls share while their gradients add up, taken back in one pass."""

    def __init__(self) -> None:
        self._held: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def __call__(self, make: Callable[[], Tensor], key: tuple[object, ...]) -> Tensor:
        """make(), a leaf with a gradient of its own; made the first time that `key` is asked for.

        What it is made of belongs to no call: one that is to be made again keeps nothing of it.
        """
        if key not in self._held:
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
                made = make()
            self._held[key] = made, made.detach().requires_grad_(True)
        return self._held[key][1]

    def take_back(self) -> None:
        """Add the gradients of what was made to those of what it was made of."""
        pairs = [(made, leaf.grad) for made, leaf in self._held.values() if leaf.grad is not None]
        torch.autograd.backward([against(made, grad) for made, grad in pairs])


class NormalizedWeight(nn.Module):
    """Linear layer or convolution without bias whose weight rows have unit magnitude.

        w_eff[o] = gain * normalize(w[o]) / sqrt(fan_in)

    (arXiv:2312.02696, section 2.3.) Where no gradient is wanted, w_eff is computed once per set
    of weights and kept: the key holds the storage address and the version counter of weight and
    gain, so that writing to either in place, through any view, makes it stale by itself. Compiled,
    it is part of the graph: keys of every layer would split that into hundreds.
    In training mode a forward pass first overwrites the stored weight by normalize(w).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 0) -> None:
        super().__init__()
        window = (kernel, kernel) if kernel else ()
        self.out_channels = out_channels
        self.padding = kernel // 2
        self.weight = nn.Parameter(_draw(torch.randn, out_channels, in_channels, *window))
        self._cached: tuple[tuple[object, ...], Tensor] | None = None
        self._asked: tuple[torch.dtype, Gain] | None = None
        self.once: Once | None = None  # holds w_eff with its gradient, where many calls share it

    def effective_weight(self, dtype: torch.dtype, gain: Gain = 1.0) -> Tensor:
        """w_eff in `dtype`; computed in float32 and cast once."""
        weight = self.weight
        if torch.compiler.is_compiling():
            return self._normalized(gain).to(dtype)
        if torch.is_grad_enabled() and weight.requires_grad:
            if self.once is None:
                return self._normalized(gain).to(dtype)
            # Cast by every call, so that gradients of all of them add up in float32.
            return self.once(lambda: self._normalized(gain), (self, *_key(gain))).to(dtype)
        key = (weight.data_ptr(), weight._version, weight.dtype, weight.device, dtype, *_key(gain))
        if self._cached is None or self._cached[0] != key:
            made = self._normalized(gain).to(dtype)
            held = None if self._cached is None else self._cached[1]
            # In the old one's place, where a CUDA graph reads it.
            self._cached = (key, made if held is None else _into(held, made))
            self._asked = dtype, gain
        return self._cached[1]

    def renewed(self) -> Tensor | None:
        """The w_eff that is kept, of the weights as they are now; None where none was asked for."""
        return None if self._asked is None else self.effective_weight(*self._asked)

    def _normalized(self, gain: Gain) -> Tensor:
        # A float16 gain gives a float16 quotient, rounded once more, as in the official sampler.
        fan_in = self.weight[0].numel()
        return normalize(self.weight.float()) * (gain / math.sqrt(fan_in))

    def forward(self, x: Tensor, gain: Gain = 1.0) -> Tensor:
        """Activations (B, C_in, ...) to (B, C_out, ...) in their own dtype."""
        if self.training:
            with torch.no_grad():
                self.weight.copy_(normalize(self.weight.float()))
        weight = self.effective_weight(x.dtype, gain)
        if weight.ndim == 2:
            return x @ weight.T
        return F.conv2d(x, weight, padding=self.padding)


def _into(held: Tensor, made: Tensor) -> Tensor:
    """`made`, in the memory of `held` where it fits."""
    alike = held.shape == made.shape and held.dtype == made.dtype and held.device == made.device
    return held.copy_(made) if alike and not held.is_inference() else made


def _key(gain: Gain) -> tuple[object, ...]:
    if isinstance(gain, Tensor):
        return (gain.data_ptr(), gain._version)
    return (gain,)


def _draw(sampler: Callable[..., Tensor], *shape: int) -> Tensor:
    """sampler(shape); on the meta device, where drawing would load a compiler, shapes alone."""
    empty = torch.empty(shape)
    return empty if empty.is_meta else sampler(shape)


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
        """Activations (B, C_in, H, W) and embedding (B or 1, cemb) to (B, C_out, H', W')."""
        x = resample(x, self.config.resample_filter, self.mode)
        if not self.decoder:
            x = self.conv_skip(x) if self.conv_skip is not None else x
            x = normalize(x, dims=(1,))
        y = self._residual(x, emb)
        if self.decoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = y.add(x, alpha=shares(self.config.res_balance)[0])
        if self.attn_qkv is not None and self.attn_proj is not None:
            kept, added = shares(self.config.attn_balance)
            y = self.attn_proj(self._attention(self.attn_qkv(x)), gain=added)
            x = y.add(x, alpha=kept)
        return x.clip_(-self.config.clip_act, self.config.clip_act)

    def _residual(self, x: Tensor, emb: Tensor) -> Tensor:
        """The branch times its share of the sum.

        Constant factors of `mp_silu` and `mp_sum` are in the weights, which are small and kept,
        and not in the activations, where each would be one more pass over memory.
        """
        y = self.conv_res0(F.silu(x), gain=1 / SILU_RMS)
        modulation = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = F.silu(y * modulation[:, :, None, None].to(y.dtype))
        if self.training and self.config.dropout:
            y = F.dropout(y, p=self.config.dropout)
        out: Tensor = self.conv_res1(y, gain=shares(self.config.res_balance)[1] / SILU_RMS)
        return out

    def _attention(self, qkv: Tensor) -> Tensor:
        """(B, 3C, H, W) with channels ordered (head, channel, q|k|v) -> (B, C, H, W)."""
        parts = torch.unflatten(qkv, 1, (self.num_heads, -1, 3)).flatten(4)
        # Each (B, heads, T, d) with d innermost: the layout that fused attention kernels need.
        q, k, v = normalize(parts.permute(3, 0, 1, 4, 2).contiguous(), dims=(4,)).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)  # scales by 1 / sqrt(d)
        return arranged(torch.unflatten(out.transpose(1, 2).flatten(2).mT, 2, qkv.shape[2:]))
