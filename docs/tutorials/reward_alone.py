"""
The reward alone, in a training loop of your own
================================================

Any generator, any features: ``SubsetReward`` says how new samples change the distance of a pool of
generated samples to real data, and its ``loss`` has a gradient. Here a small network learns to map
noise to the shape of two half moons, from nothing but that distance.
"""

# %%
# Data, features, generator
# -------------------------
# A Fréchet distance compares means and covariances. Of bare coordinates these say little about the
# shape, of 64 random waves much: two clouds with equal moments of all waves are nearly the same.

import math

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import merge_rl as mrl

draw = torch.Generator().manual_seed(0)
torch.manual_seed(0)


def half_moons(count: int) -> Tensor:
    """Points (count, 2) on two half circles, with some noise."""
    angle = math.pi * torch.rand(count, generator=draw)
    upper = torch.rand(count, generator=draw) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return torch.stack([x, y], 1) + 0.05 * torch.randn(count, 2, generator=draw)


frequencies = 1.5 * torch.randn(2, 64, generator=draw)
phases = 2 * math.pi * torch.rand(64, generator=draw)


def features(points: Tensor) -> Tensor:
    """Points (n, 2) to 64 waves (n, 64)."""
    return (points @ frequencies + phases).cos()


generator = nn.Sequential(
    nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
)


def make(count: int) -> Tensor:
    """Points (count, 2) that the network makes of fresh noise."""
    points: Tensor = generator(torch.randn(count, 2, generator=draw))
    return points


# %%
# The loop
# --------
# The pool holds samples of the network as it is: every step renews a part of it. Nothing of the
# loop is the package's, but the reward. The learning rate falls to 0: the distance settles.

with torch.no_grad():
    before = make(1000)
    reward = mrl.SubsetReward(features(half_moons(5000)), pool=features(before))
optimizer = torch.optim.Adam(generator.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
distances = [reward.distance]
for _ in range(800):
    made = features(make(250))
    loss = reward.loss(made)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    reward.renew(made)
    distances.append(reward.distance)
print(f"distance {distances[0]:.2f} before, {distances[-1]:.2f} after")

# %%
# What it learned
# ---------------
# The outline; what is between the moons, waves as long as these hardly tell.

with torch.no_grad():
    clouds = {"before": before, "after": make(1000), "data": half_moons(1000)}
figure, plots = plt.subplots(1, 4, figsize=(11, 2.8), layout="constrained")
for axes, (name, points) in zip(plots, clouds.items(), strict=False):
    axes.scatter(*points.T, s=2)
    axes.set(title=name, xlim=(-2, 3), ylim=(-1.5, 2), aspect="equal")
plots[3].semilogy(distances)
plots[3].set(title="distance to the data", xlabel="step")
plt.show()

# %%
# Without a gradient
# ------------------
# Called with the features of several candidates, the reward compares them: all replace the same
# rows of the pool, and so a few samples of each are enough to tell them apart.

with torch.no_grad():
    candidates = torch.stack([features(make(50)), features(make(50) + 0.3)])
print("as it is, and moved by 0.3:", [f"{value:.4f}" for value in reward(candidates)])
