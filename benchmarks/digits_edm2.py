"""The EDM2 of the embedded digits runs: the recipe of EDM2 at small scale.

The loss with learned uncertainty, Adam (0.9, 0.99), a learning rate with warm-up and inverse square
root decay that starts at 7 % of the training; two power-function EMAs.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

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
BATCH = 256
SNAPSHOTS = 8
SNAPSHOT_EVERY = 1024 * BATCH  # images
REF_LR, WARMUP_IMAGES = 0.012, 10_000
P_MEAN, P_STD = -0.4, 1.0
EMA_STDS = (0.05, 0.10)
SAMPLER = {"solver": "heun", "num_steps": 8}  # over the official noise levels


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


def learning_rate(nimg: int) -> float:
    """Warm-up, then inverse square root decay from 7 % of the training on."""
    decay_from = 0.07 * SNAPSHOTS * SNAPSHOT_EVERY
    return REF_LR * min(nimg / WARMUP_IMAGES, 1) / math.sqrt(max(nimg / decay_from, 1))


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

    def __init__(self, model: EDM2, snapshots: Snapshots) -> None:
        self.model, self.snapshots = model, snapshots
        self.emas = {std: [p.detach().clone() for p in model.parameters()] for std in EMA_STDS}

    def update(self, nimg: int) -> None:
        for std, ema in self.emas.items():
            beta = ema_beta(std, nimg, BATCH)
            torch._foreach_lerp_(ema, list(self.model.parameters()), 1 - beta)

    def save(self, nimg: int) -> None:
        raw = self.model.state_dict()
        self.snapshots.write("raw", nimg, raw)
        names = [name for name, _ in self.model.named_parameters()]
        for std, ema in self.emas.items():
            averaged = {**raw, **dict(zip(names, ema, strict=True))}
            self.snapshots.write(f"ema-{std:.3f}", nimg, averaged, std)


def train(images: Tensor, labels: Tensor, folder: Path) -> None:
    """Train from scratch; writes the snapshots and their manifest."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = build_model(CONFIG).train()
    assert isinstance(model, EDM2)
    Block._attention = plain_attention  # type: ignore[method-assign]
    latents = PixelEncoder().encode(images)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    snapshots = Snapshots(folder)
    trajectory, began, running = Trajectory(model, snapshots), time.time(), 0.0
    for nimg in range(BATCH, SNAPSHOTS * SNAPSHOT_EVERY + 1, BATCH):
        rows = torch.randint(len(labels), (BATCH,), generator=generator)
        loss = edm2_loss(model, latents[rows], labels[rows], generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(nimg)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        trajectory.update(nimg)
        running = 0.99 * running + 0.01 * float(loss.detach())
        if nimg % SNAPSHOT_EVERY == 0:
            trajectory.save(nimg)
            print(f"{nimg} images, loss {running:.3f}, {time.time() - began:.0f} s", flush=True)
    snapshots.finish("digits-edm2", CONFIG, SAMPLER)
