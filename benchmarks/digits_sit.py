"""The SiT of the embedded digits runs: the recipe of SiT at small scale.

The linear path and the mean squared error of the velocity at uniform times, AdamW without weight
decay, labels dropped with probability 0.1, one EMA of constant decay. The learning rate stays where
it is after a warm-up, as in the public training: a snapshot is noisy, an average is not. On one
thread, since how many there are decides how sums round.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.digits_data import Snapshots
from merge_rl.models.autoencoder import PixelEncoder
from merge_rl.models.sit import SiT
from merge_rl.registry import build_model

CONFIG = {
    "model": "sit",
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 1,
    "hidden_size": 48,
    "depth": 3,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "class_dropout_prob": 0.1,
    "num_classes": 10,
    "learn_sigma": False,
}
BATCH = 128
SNAPSHOTS = 8
SNAPSHOT_EVERY = 2048 * BATCH  # images
EMA_SNAPSHOTS = (2, 4, 6, 8)  # which of the snapshots are kept of the EMA too
EMA_DECAY = 0.999  # a step
LEARNING_RATE, WARMUP_STEPS = 4e-3, 100
# 16 network calls. Heun would need three times as many to come as close to the ODE's end.
SAMPLER = {"solver": "midpoint", "num_steps": 8, "sde_num_steps": 50}


def sit_loss(model: SiT, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Mean of |v(x_t, t) - (x - noise)|^2 with x_t = t x + (1 - t) noise (Ma et al., 2024)."""
    count = len(images)
    dropped = torch.rand(count, generator=generator) < model.class_dropout_prob
    t = torch.rand(count, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    time_, velocity = t[:, None, None, None], images - noise
    predicted = model(time_ * images + (1 - time_) * noise, t, model.drop_labels(labels, dropped))
    loss: Tensor = (predicted - velocity).square().mean()
    return loss


def train(images: Tensor, labels: Tensor, folder: Path) -> None:
    """Train from scratch; writes the snapshots and their manifest."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = build_model(CONFIG).train()
    assert isinstance(model, SiT)
    latents = PixelEncoder().encode(images)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], weight_decay=0.0
    )
    state = model.state_dict()  # the parameters themselves, not copies
    ema = {name: tensor.clone() for name, tensor in state.items()}
    snapshots, began, running = Snapshots(folder), time.time(), 0.0
    for nimg in range(BATCH, SNAPSHOTS * SNAPSHOT_EVERY + 1, BATCH):
        rows = torch.randint(len(labels), (BATCH,), generator=generator)
        loss = sit_loss(model, latents[rows], labels[rows], generator)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(nimg / BATCH / WARMUP_STEPS, 1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        torch._foreach_lerp_(list(ema.values()), list(state.values()), 1 - EMA_DECAY)
        running = 0.99 * running + 0.01 * float(loss.detach())
        if nimg % SNAPSHOT_EVERY == 0:
            if nimg // SNAPSHOT_EVERY in EMA_SNAPSHOTS:
                snapshots.write("ema", nimg, ema)
            # After the EMA of the same time, so that the newest of the whole set is a raw one.
            snapshots.write("raw", nimg, state)
            print(f"{nimg} images, loss {running:.3f}, {time.time() - began:.0f} s", flush=True)
    snapshots.finish("digits-sit", CONFIG, SAMPLER)
