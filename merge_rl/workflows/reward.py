"""The subset-replace reward (arXiv:2607.02291, section 4.1): pool, subsets, distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_rl.core.distances import FrechetReference
from merge_rl.core.statistics import FeatureStats, feature_stats, replace_rows
from merge_rl.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Pool:
    """Generated images that stand for the model's distribution: features, labels, moments."""

    features: Tensor  # (N, D) float32
    labels: Tensor  # (N,) int64
    stats: FeatureStats

    @classmethod
    def of(cls, features: Tensor, labels: Tensor) -> Pool:
        """A pool with freshly computed moments; non-finite features are refused."""
        return cls(features, labels, feature_stats(features))

    def __len__(self) -> int:
        return len(self.labels)

    def stats_with(self, rows: Tensor, features: Tensor) -> FeatureStats:
        """Moments after replacing rows (n,) by features (n, D): rank 2n + 1, not N rows."""
        return replace_rows(self.stats, self.features[rows], features)

    def replaced(self, rows: Tensor, features: Tensor) -> Pool:
        """The pool after replacing rows; this one is left as it is."""
        if len(rows) == len(self):
            stats = feature_stats(features)  # nothing of the old moments is left to update
        else:
            stats = self.stats_with(rows, features)
        return Pool(self.features.index_copy(0, rows, features), self.labels, stats)


def draw_subset(labels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Row indices (size,) of a random subset with the class proportions of labels (N,).

    Systematic sampling: rows are lined up class by class, shuffled within, and every (N / size)-th
    is taken from a random phase on. Every row is as likely as any other, and a class of share p
    gives p * size rows, rounded up or down.
    """
    count = len(labels)
    if not 0 < size <= count:
        raise ConfigError(f"expected a subset of 1..{count} rows, got {size}")
    line = torch.randperm(count, generator=generator)
    line = line[labels[line].argsort(stable=True)]
    phase = torch.rand([], generator=generator, dtype=torch.float64)
    picked = ((torch.arange(size) + phase) * (count / size)).long().clamp(max=count - 1)
    return line[picked].sort().values


class SubsetReplaceFID:
    """R = - FID[(pool without the subset) + fresh images, reference] (equation 4)."""

    def __init__(self, reference: FeatureStats) -> None:
        self._reference = FrechetReference.from_stats(reference)

    def pool_distance(self, pool: Pool) -> float:
        """FID of the pool itself."""
        return self._reference.distance(pool.stats)

    def reward(self, pool: Pool, rows: Tensor, features: Tensor) -> float:
        """Reward of fresh features (n, D) in place of the pool's rows (n,); higher is better.

        NaN where a feature is not finite: a failed candidate is data, and ranks last.
        """
        if not bool(features.isfinite().all()):
            return float("nan")
        return -self._reference.distance(pool.stats_with(rows, features))

    def mean_reward(self, pool: Pool, draws: Sequence[tuple[Tensor, Tensor]]) -> float:
        """Mean over (rows, features) draws: Ns subsets x Nr replacements (equation 10)."""
        rewards = [self.reward(pool, rows, features) for rows, features in draws]
        return sum(rewards) / len(rewards)


def pool_gap(before: float, after: float, share: float) -> float:
    """How far a pool lags behind the policy: relative, first order, noise aside 0 on policy.

        gap = (distance after a refresh - distance before) / (share refreshed * distance before)

    Fresh images of an on-policy pool change its distance by chance alone. If they make it clearly
    worse, the pool had been selected to compensate errors that the policy no longer makes: its
    distance, and the rewards measured in it, look better than the policy is. Comparing within one
    pool keeps N equal; the distance of a small fresh sample alone would be biased upward.
    """
    return (after - before) / (share * before)
