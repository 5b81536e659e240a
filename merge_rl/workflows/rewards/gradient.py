"""The gradient of a reward by the features of fresh images, at the pool of the present policy.

The influence function IF of a distance says what an image changes the pool's distance by, to first
order; for the gradient of the distance of the policy's own distribution first order is exact:

    d distance / d theta = E[d IF(features(theta)) / d theta],    IF held at the pool
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from merge_rl.errors import ConfigError
from merge_rl.rng import draw_subset
from merge_rl.workflows.rewards.pool import Pool
from merge_rl.workflows.rewards.sum import RewardSum

Influence = Callable[[Tensor], Tensor]
"""Features (n, D) -> (n,) float64, differentiable."""


@runtime_checkable
class Differentiable(Protocol):
    """A reward with a derivative."""

    device: str

    def pool_distance(self, pool: Pool, /) -> float:
        """Distance of the pool to the real data."""
        ...

    def influence(self, pool: Pool, /) -> Influence:
        """What an image changes the pool's distance by, times N, to first order."""
        ...

    def distance_of(self, features: Tensor, /) -> float:
        """Distance of features (n, D) on their own."""
        ...


class RewardGradient:
    """A sum of rewards with derivatives, at one pool.

    Raises ConfigError for a term without a derivative, by its name.
    """

    def __init__(self, reward: RewardSum, pool: Pool) -> None:
        self.pool = pool
        require_gradient(reward)
        self._terms = [
            (term, term.reward, reward.view(pool, term))
            for term in reward.terms
            if isinstance(term.reward, Differentiable)
        ]

    def influence(self, features: Tensor) -> Tensor:
        """Σ weight_t IF_t of features (n, D): (n,) float64 on the CPU, differentiable."""
        total = torch.zeros(len(features), dtype=torch.float64)
        for term, reward, view in self._terms:
            own = features[:, term.start : term.stop].to(reward.device)
            total = total + term.weight * reward.influence(view)(own).cpu()
        return total

    def cotangents(self, features: Tensor) -> Tensor:
        """The gradient of the mean influence of features (n, D) by each of them, (n, D)."""
        with torch.enable_grad():
            leaf = features.detach().clone().requires_grad_(True)
            (found,) = torch.autograd.grad(self.influence(leaf).mean(), leaf)
        return found

    def level(self, generator: torch.Generator, oldest: int = 0) -> Level:
        """The distance of the pool, and from two random halves what is wrong with it.

        A bias that falls as 1 / N is as large as what the halves' mean lies above the whole; for
        an unbiased distance both agree but for chance. Rows count as newer from `oldest` on.
        """
        count = len(self.pool)
        drawn = draw_subset(self.pool.labels, count // 2, generator)
        half = torch.zeros(count, dtype=torch.bool).index_fill(0, drawn, True)
        older = (torch.arange(count) - oldest) % count < count // 2
        whole = sum(term.weight * reward.pool_distance(view) for term, reward, view in self._terms)
        first, second = self._distance(half), self._distance(~half)
        return Level(
            distance=whole,
            bias=(first + second) / 2 - whole,
            noise=abs(first - second) / 2,
            trend=self._distance(older) - self._distance(~older),
        )

    def _distance(self, rows: Tensor) -> float:
        """Of those rows (N,) bool of the pool on their own."""
        return sum(
            term.weight * r.distance_of(view.features[rows]) for term, r, view in self._terms
        )


@dataclass(frozen=True)
class Level:
    """A distance of a pool, and what its halves tell of it."""

    distance: float
    bias: float  # about how much too large it is
    noise: float  # about how much of it is chance
    trend: float = 0.0  # what the newer half is better by than the older one

    @property
    def unbiased(self) -> float:
        """The distance without its bias."""
        return self.distance - self.bias


def require_gradient(
    reward: RewardSum,
    who: str = "the searcher pathwise",
    instead: str = "the searcher auto, which does without",
) -> None:
    """Raise ConfigError for a term without a derivative, by its name."""
    for term in reward.terms:
        if not isinstance(term.reward, Differentiable):
            raise ConfigError(
                f"{who} needs rewards with a derivative, got {term.name!r}; "
                f"expected fid-subset, kid-subset or mmd-subset, or {instead}"
            )
