"""The EDM2 of the embedded digits runs: the recipe of EDM2 at small scale.

The loss with learned uncertainty, Adam (0.9, 0.99), a learning rate with warm-up and inverse square
root decay that starts at 7 % of the training; two power-function EMAs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.digits_data import Snapshots
from merge_rl.core.merging.ema_profiles import ema_beta
from merge_rl.models.autoencoder import PixelEncoder
from merge_rl.models.edm2 import EDM2
from merge_rl.models.edm2_layers import Block, normalize
from merge_rl.registry import build_model

CONFIG = {
    "model": "edm2",
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 10,
    "use_fp16": False,
    "sigma_data": 0.75,  # standard deviation of the digits scaled to [-1, 1]
    "logvar_channels": 16,
    "model_channels": 12,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "channels_per_head": 12,
}
WARMUP_IMAGES = 10_000
P_MEAN, P_STD = -0.4, 1.0
EMA_STDS = (0.05, 0.10)


@dataclass(frozen=True)
class Recipe:
    """What differs between the EDM2s of the embedded runs; counts and times are of images.

    A leg of the training goes from the time it is named by to the last of its snapshots. The first
    begins with random weights, another with what was stored at its time, as a run that was cut
    goes on from its files: averages included, the optimizer anew.
    """

    name: str
    config: Mapping[str, Any]
    batch: int
    legs: Mapping[int, Sequence[int]]  # from a time on, snapshots at these times
    averaged: Collection[int]  # times at which the EMAs are stored too
    ref_lr: float
    decay_from: float  # where the learning rate's inverse square root decay begins
    sampler: Mapping[str, Any] = field(default_factory=lambda: {"solver": "heun", "num_steps": 8})

    def learning_rate(self, nimg: int, start: int) -> float:
        """Warm-up from the start of the leg, then inverse square root decay."""
        decay = math.sqrt(max(nimg / self.decay_from, 1))
        return self.ref_lr * min((nimg - start) / WARMUP_IMAGES, 1) / decay


TIMES = range(1024 * 256, 8 * 1024 * 256 + 1, 1024 * 256)
DIGITS = Recipe(
    name="digits-edm2",
    config=CONFIG,
    batch=256,
    legs={0: TIMES},
    averaged=TIMES,
    ref_lr=0.012,
    decay_from=0.07 * TIMES[-1],
)


def edm2_loss(model: EDM2, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Mean of lambda(sigma) / exp(u) |D - y|^2 + u (Karras et al., 2024, equation 14)."""
    normal = torch.randn(len(images), 1, 1, 1, generator=generator)
    sigma = (normal * P_STD + P_MEAN).exp()
    weight = (sigma**2 + model.sigma_data**2) / (sigma * model.sigma_data) ** 2
    noise = torch.randn(images.shape, generator=generator) * sigma
    denoised = model(images + noise, sigma.flatten(), labels)
    u = model.logvar(sigma.flatten())
    loss: Tensor = (weight / u.exp() * (denoised - images).square() + u).mean()
    return loss


def plain_attention(self: Block, qkv: Tensor) -> Tensor:
    """The block's attention without the layout of fused kernels.

    Training multiplies every rounding into another trajectory. The committed files were made with
    this kernel; with it they can be made again, whatever kernel the package picks for speed.
    """
    batch, channels, height, width = qkv.shape
    qkv = qkv.reshape(batch, self.num_heads, -1, 3, height * width)
    q, k, v = normalize(qkv, dims=(2,)).unbind(3)
    out = F.scaled_dot_product_attention(q.mT, k.mT, v.mT)
    return out.mT.reshape(batch, channels // 3, height, width)


class Trajectory:
    """Keeps the power-function EMAs up to date and writes snapshots."""

    def __init__(self, model: EDM2, snapshots: Snapshots, recipe: Recipe) -> None:
        self.model, self.snapshots, self.recipe = model, snapshots, recipe
        self.emas = {std: [p.detach().clone() for p in model.parameters()] for std in EMA_STDS}

    def load(self, nimg: int) -> None:
        """Weights and averages as they were stored."""
        self.model.load_state_dict(self.snapshots.read("raw", nimg))
        names = [name for name, _ in self.model.named_parameters()]
        for std in EMA_STDS:
            stored = self.snapshots.read(f"ema-{std:.3f}", nimg, std)
            self.emas[std] = [stored[name] for name in names]

    def update(self, nimg: int) -> None:
        for std, ema in self.emas.items():
            beta = ema_beta(std, nimg, self.recipe.batch)
            torch._foreach_lerp_(ema, list(self.model.parameters()), 1 - beta)

    def save(self, nimg: int) -> None:
        raw = self.model.state_dict()
        self.snapshots.write("raw", nimg, raw)
        if nimg not in self.recipe.averaged:
            return
        names = [name for name, _ in self.model.named_parameters()]
        for std, ema in self.emas.items():
            averaged = {**raw, **dict(zip(names, ema, strict=True))}
            self.snapshots.write(f"ema-{std:.3f}", nimg, averaged, std)


def train(images: Tensor, labels: Tensor, folder: Path, recipe: Recipe = DIGITS) -> None:
    """Train from scratch; writes the snapshots and their manifest."""
    torch.manual_seed(0)
    model = build_model(recipe.config).train()
    assert isinstance(model, EDM2)
    Block._attention = plain_attention  # type: ignore[method-assign]
    latents = PixelEncoder().encode(images)
    trajectory = Trajectory(model, Snapshots(folder), recipe)
    for start in recipe.legs:
        train_leg(trajectory, latents, labels, start)
    trajectory.snapshots.finish(recipe.name, recipe.config, recipe.sampler)


def train_leg(trajectory: Trajectory, latents: Tensor, labels: Tensor, start: int) -> None:
    """Train from `start` on, which is also the seed of what is drawn."""
    model, recipe = trajectory.model, trajectory.recipe
    if start:
        trajectory.load(start)
    generator = torch.Generator().manual_seed(start)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    began, running, times = time.time(), 0.0, recipe.legs[start]
    for nimg in range(start + recipe.batch, times[-1] + 1, recipe.batch):
        rows = torch.randint(len(labels), (recipe.batch,), generator=generator)
        loss = edm2_loss(model, latents[rows], labels[rows], generator)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(nimg, start)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        trajectory.update(nimg)
        running = 0.99 * running + 0.01 * float(loss.detach())
        if nimg in times:
            trajectory.save(nimg)
            print(f"{nimg} images, loss {running:.3f}, {time.time() - began:.0f} s", flush=True)
