"""
Post-hoc EMA: the best width, after the training
================================================

A run that keeps two averages of its weights, of different widths, at several times, can be given an
average of any width afterwards. Here a flow of points is trained, its averages are converted as a
``PostHocEMA`` folder, and ``ema-grid`` looks for the width and the end that generate best.
"""

# %%
# A training run with two averages
# --------------------------------
# ``PostHocEMA`` of the library ema-pytorch keeps the averages, and writes a file
# ``{index}.{step}.pt`` for each of them and every time.

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from ema_pytorch import PostHocEMA
from torch import Tensor, nn

import merge_rl as mrl
from merge_rl.storage.checkpoints import open_checkpoints
from merge_rl.workflows.export import ema_coefficients

torch.manual_seed(0)
folder = Path(tempfile.mkdtemp())


def half_moons(count: int) -> Tensor:
    """Points (count, 2) on two half circles, with some noise."""
    angle = math.pi * torch.rand(count)
    upper = torch.rand(count) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return torch.stack([x, y], 1) + 0.05 * torch.randn(count, 2)


network = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
optimizer = torch.optim.Adam(network.parameters(), lr=4e-2)
averages = PostHocEMA(
    network, sigma_rels=(0.05, 0.2), update_every=2, checkpoint_every_num_steps=100,
    checkpoint_folder=folder / "post-hoc-ema-checkpoints",
)  # fmt: skip
for _ in range(800):
    data, noise, t = half_moons(128), torch.randn(128, 2), torch.rand(128, 1)
    velocity = network(torch.cat([t * data + (1 - t) * noise, t], 1))
    loss = (velocity - (data - noise)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    averages.update()  # every 100 steps it saves

# %%
# Conversion
# ----------
# The files say neither the widths nor how often the averages were updated, which makes them wider:
# see the column of widths. On the command line the same is
# ``mergerl convert post-hoc-ema-checkpoints ckpts --ema-std 0.05,0.2 --update-every 2``.

mrl.convert(
    folder / "post-hoc-ema-checkpoints", folder / "ckpts", ema_std="0.05,0.2", update_every=2,
    images_per_step=128,
)  # fmt: skip
checkpoints = open_checkpoints(folder / "ckpts")
for entry in checkpoints.entries[-2:]:
    print(entry.file, entry.nimg, f"ema_std {entry.ema_std:.3f}")

# %%
# Coefficients that rebuild an average of another width at the end of the training; on the command
# line ``mergerl merge ckpts merged --ema-std 0.1``.

for name, value in zip(checkpoints.names, ema_coefficients(checkpoints, 0.1), strict=True):
    print(f"{name:16} {value:+.3f}")

# %%
# The best of a grid
# ------------------
# What a merge generates, from the noise of each seed, and the waves that tell its distribution.

frequencies, phases = 1.5 * torch.randn(2, 32), 2 * math.pi * torch.rand(32)


def features(points: Tensor) -> Tensor:
    """Points (n, 2) to 32 waves (n, 32)."""
    return (points @ frequencies + phases).cos()


def points_of(network: nn.Module, seeds: Sequence[int]) -> Tensor:
    """Points (n, 2): eight steps of Euler from the noise of each seed."""
    x = mrl.seeded_noise(seeds, (2,))
    for step in range(8):
        x = x + network(torch.cat([x, torch.full((len(x), 1), step / 8)], 1)) / 8
    return x


def generate(network: nn.Module, seeds: Sequence[int], labels: Tensor) -> Tensor:
    """Features of what the network makes; there are no classes here."""
    return features(points_of(network, seeds))


result = mrl.search(
    folder / "ckpts",
    generate=generate,
    model=network,
    reference=features(half_moons(5000)),
    heldout=features(half_moons(5000)),
    out=folder / "run",
    searcher="ema-grid",
    budget=20_000,
    pool_size=500,
    progress=False,
)
print(result.verdict)

# %%
# The weights in time that the search chose, by the coefficients of what was saved.

coefficients = result.coefficients.flatten()
figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
axes.bar(checkpoints.names, coefficients)
axes.set(ylabel="coefficient")
axes.tick_params(axis="x", rotation=60)
plt.show()
