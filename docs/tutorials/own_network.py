"""
Your own network: merging a flow of points
==========================================

``merge_rl.search`` asks for two things: checkpoints with equal names and shapes, and a function
that generates from them. What the network is does not matter. Here it is a small velocity field,
trained with a large step, whose snapshots are merged along the gradient of the reward.
"""

# %%
# A training run
# --------------
# Flow matching: between noise (t = 0) and data (t = 1) the velocity of a straight path is data
# minus noise. The learning rate stays high, so that the last snapshots circle about a good place.

import copy
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import merge_rl as mrl

torch.manual_seed(0)


def half_moons(count: int) -> Tensor:
    """Points (count, 2) on two half circles, with some noise."""
    angle = math.pi * torch.rand(count)
    upper = torch.rand(count) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return torch.stack([x, y], 1) + 0.05 * torch.randn(count, 2)


class Velocity(nn.Module):
    """v(x, t): points (n, 2) and times (n, 1) to velocities (n, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(),
            nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2),
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity at x and t."""
        found: Tensor = self.layers(torch.cat([x, t], 1))
        return found


network, snapshots = Velocity(), []
optimizer = torch.optim.Adam(network.parameters(), lr=2e-2)
for step in range(1, 2001):
    data, noise, t = half_moons(256), torch.randn(256, 2), torch.rand(256, 1)
    loss = (network(t * data + (1 - t) * noise, t) - (data - noise)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step > 1200 and step % 100 == 0:
        snapshots.append(copy.deepcopy(network))

# %%
# What it generates
# -----------------
# A row follows from the weights and its seed alone: the same seed is the same noise for every
# merge. Features are waves, whose means and covariances tell the shape of a cloud.

frequencies, phases = 1.5 * torch.randn(2, 32), 2 * math.pi * torch.rand(32)


def features(points: Tensor) -> Tensor:
    """Points (n, 2) to 32 waves (n, 32)."""
    return (points @ frequencies + phases).cos()


def points_of(network: nn.Module, seeds: Sequence[int]) -> Tensor:
    """Points (n, 2): eight steps of Euler from the noise of each seed."""
    x = mrl.seeded_noise(seeds, (2,))
    for step in range(8):
        x = x + network(x, torch.full((len(x), 1), step / 8)) / 8
    return x


def generate(network: nn.Module, seeds: Sequence[int], labels: Tensor) -> Tensor:
    """Features of what the network makes; there are no classes here."""
    return features(points_of(network, seeds))


# %%
# The search
# ----------

result = mrl.search(
    snapshots,
    generate=generate,
    reference=features(half_moons(5000)),
    heldout=features(half_moons(5000)),
    out=Path(tempfile.mkdtemp()) / "run",
    budget=16_000,
    pool_size=1000,
    progress=False,
)
print(result.verdict)

# %%
# The newest snapshot and the merge, from the same seeds.

merged = copy.deepcopy(network)
merged.load_state_dict(load_file(result.run_dir / "merged/model.safetensors"))
clouds = {
    "newest": points_of(network, range(1000)),
    "merged": points_of(merged, range(1000)),
    "data": half_moons(1000),
}
figure, plots = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
for axes, (name, points) in zip(plots, clouds.items(), strict=True):
    axes.scatter(*points.detach().T, s=2)
    axes.set(title=name, xlim=(-1.5, 2.5), ylim=(-1, 1.5), aspect="equal")
plt.show()
