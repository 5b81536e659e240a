"""The EDM2 of the embedded digits runs: the recipe of EDM2 at small scale.

The loss with learned uncertainty, Adam (0.9, 0.99), a learning rate with warm-up and inverse square
root decay that starts at 7 % of the training; two power-function EMAs. On a GPU the step
is replayed as a CUDA graph: so small a network is bound by its launches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

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
REPORT_EVERY = 500  # steps
EMA_STDS = (0.05, 0.10)

Step: TypeAlias = Callable[..., Tensor]  # one batch of images, labels, sigma, noise to its loss


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
    log_sigma: tuple[float, float] = (-0.4, 1.0)  # mean and deviation of ln(sigma) in the loss
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


def edm2_loss(model: EDM2, images: Tensor, labels: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Mean of lambda(sigma) / exp(u) |D - y|^2 + u (Karras et al., 2024, equation 14).

    Images and unit noise are (B, C, R, R), sigma (B, 1, 1, 1), labels class ids or soft rows.
    """
    weight = (sigma**2 + model.sigma_data**2) / (sigma * model.sigma_data) ** 2
    denoised = model(images + noise * sigma, sigma.flatten(), labels)
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
        for std, ema in self.emas.items():
            stored = self.snapshots.read(f"ema-{std:.3f}", nimg, std)
            for mine, name in zip(ema, names, strict=True):
                mine.copy_(stored[name])

    def update(self, nimg: int) -> None:
        for std, ema in self.emas.items():
            beta = ema_beta(std, nimg, self.recipe.batch)
            torch._foreach_lerp_(ema, list(self.model.parameters()), 1 - beta)

    def save(self, nimg: int) -> None:
        raw = self.model.state_dict()
        self.snapshots.write("raw", nimg, raw)
        names = [name for name, _ in self.model.named_parameters()]
        for std, ema in self.emas.items() if nimg in self.recipe.averaged else ():
            averaged = {**raw, **dict(zip(names, ema, strict=True))}
            self.snapshots.write(f"ema-{std:.3f}", nimg, averaged, std)
        # Each time, so that a run that is cut leaves a set.
        recipe = self.recipe
        self.snapshots.finish(recipe.name, recipe.config, recipe.sampler)


def train(
    images: Tensor, labels: Tensor, folder: Path, recipe: Recipe = DIGITS, device: str = "cpu"
) -> None:
    """Train from scratch; writes the snapshots and, after each, the manifest of those there are."""
    torch.manual_seed(0)
    model = build_model(recipe.config).train().to(device)
    assert isinstance(model, EDM2)
    Block._attention = plain_attention  # type: ignore[method-assign]
    latents = PixelEncoder().encode(images).to(device)
    rows = F.one_hot(labels.to(device), model.label_dim).float()
    trajectory = Trajectory(model, Snapshots(folder), recipe)
    for start in recipe.legs:
        train_leg(trajectory, latents, rows, start)


def train_leg(trajectory: Trajectory, latents: Tensor, labels: Tensor, start: int) -> None:
    """Train from `start` on, which is also the seed of what is drawn."""
    recipe, device = trajectory.recipe, latents.device
    if start:
        trajectory.load(start)
    generator = torch.Generator(device).manual_seed(start)
    # A tensor, from which a graph reads the rate of the step at hand; fused kernels want float32.
    dtype = torch.float32 if device.type == "cuda" else torch.float64
    rate = torch.zeros((), device=device, dtype=dtype)
    step = training_step(trajectory.model, rate)
    began, running, times = time.time(), torch.zeros((), device=device), recipe.legs[start]
    for nimg in range(start + recipe.batch, times[-1] + 1, recipe.batch):
        batch = draw_batch(latents, labels, recipe, generator)
        if device.type == "cuda" and nimg == start + recipe.batch:
            step = captured(step, batch)
        rate.fill_(recipe.learning_rate(nimg, start))
        running.lerp_(step(*batch), 0.01)
        trajectory.update(nimg)
        if nimg in times:
            trajectory.save(nimg)
        if nimg in times or (nimg - start) % (REPORT_EVERY * recipe.batch) == 0:
            print(f"{nimg} images, loss {running:.3f}, {time.time() - began:.0f} s", flush=True)


def draw_batch(
    latents: Tensor, labels: Tensor, recipe: Recipe, generator: torch.Generator
) -> list[Tensor]:
    """Images (B, C, R, R), labels (B, K), sigma (B, 1, 1, 1) and unit noise (B, C, R, R)."""
    device, count = latents.device, recipe.batch
    rows = torch.randint(len(labels), (count,), generator=generator, device=device)
    normal = torch.randn(count, 1, 1, 1, generator=generator, device=device)
    mean, deviation = recipe.log_sigma
    images = latents[rows]
    noise = torch.randn(images.shape, generator=generator, device=device)
    return [images, labels[rows], (normal * deviation + mean).exp(), noise]


def training_step(model: EDM2, rate: Tensor) -> Step:
    """A step of Adam at the learning rate that `rate` holds when it is called."""
    on_gpu = rate.is_cuda
    optimizer = torch.optim.Adam(
        model.parameters(), rate, betas=(0.9, 0.99), fused=on_gpu, capturable=on_gpu
    )

    def step(*batch: Tensor) -> Tensor:
        loss = edm2_loss(model, *batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return step


def captured(step: Step, batch: Sequence[Tensor]) -> Step:
    """The step as a CUDA graph; what it needs is allocated by three steps before."""
    inputs = [tensor.clone() for tensor in batch]
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(*inputs)

    def replay(*batch: Tensor) -> Tensor:
        for kept, new in zip(inputs, batch, strict=True):
            kept.copy_(new)
        graph.replay()
        return loss

    return replay
