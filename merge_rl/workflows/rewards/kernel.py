"""Rewards by kernel distances (KID, MMD): of the pool with a subset replaced, or of own images.

They compare with the features of real images themselves, so the reference must hold them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from merge_rl.core.distances.kernels import (
    Kernel,
    KernelPool,
    KernelReference,
    RBFKernel,
    Witness,
    cubic_kernel,
    median_bandwidth,
)
from merge_rl.workflows.rewards.frechet import Pool, RewardSource, Subset, own_rewards


class KernelReward:
    """What both forms share: the reference's features, and the kernel sums of a pool.

    The sums of a pool that differs from the last one in some rows are updated. An update ends in
    other last bits than fresh sums, so a resumed search restores them from `state_dict`.
    """

    def __init__(self, source: RewardSource, kernel: Kernel, features: Tensor) -> None:
        self.device = source.device
        self.reference = KernelReference.of(features, kernel)
        self._last: tuple[Pool, KernelPool] | None = None

    def prepared(self, pool: Pool) -> KernelPool:
        """The pool with its kernel sums."""
        if self._last is None or self._last[0] is not pool:
            self._last = (pool, self._follow(pool))
        return self._last[1]

    def _follow(self, pool: Pool) -> KernelPool:
        features = pool.features.to(self.device)
        if self._last is None or self._last[1].features.shape != features.shape:
            return self.reference.pool(features)
        rows = (self._last[1].features != features).any(1).nonzero()[:, 0]
        return self._last[1].replaced(rows, features[rows])

    def pool_distance(self, pool: Pool) -> float:
        """Unbiased squared MMD of the pool to the reference; may be negative."""
        return self.prepared(pool).distance

    def distance_of(self, features: Tensor) -> float:
        """Unbiased squared MMD of features (n, D) on their own."""
        return self.reference.pool(features.to(self.device)).distance

    def state_dict(self, pool: Pool) -> dict[str, Tensor]:
        """The kernel sums of the pool, if there are some yet."""
        if self._last is None or self._last[0] is not pool:
            return {}
        return {"within": self._last[1].within.cpu(), "across": self._last[1].across.cpu()}

    def load_state_dict(self, pool: Pool, state: Mapping[str, Tensor]) -> None:
        """Take the sums of the pool from a saved state; without one they are computed when due."""
        self._last = None
        if state:
            sums = (state[name].to(self.device) for name in ("within", "across"))
            features = pool.features.to(self.device)
            self._last = (pool, KernelPool(self.reference, features, *sums))


class SubsetKernel(KernelReward):
    """R = - MMD²[(pool without the subset) + fresh images, reference], unbiased, all pairs."""

    def influence(self, pool: Pool) -> Witness:
        """What an image changes the pool's distance by, times N, to first order."""
        return Witness(self.prepared(pool))

    def rewards(self, pool: Pool, draws: Sequence[Subset]) -> Tensor:
        """Mean over draws, (P,) float64 on the CPU; NaN where a feature is not finite."""
        prepared = self.prepared(pool)
        parts = []
        for rows, features in draws:
            parts.append(
                own_rewards(features, partial(prepared.distance_with, rows.to(self.device)))
            )
        return torch.stack(parts).mean(0)


class FullKernel(KernelReward):
    """R = - MMD²[a candidate's own images, reference], unbiased, also at few images."""

    def rewards(self, _pool: Pool, draws: Sequence[Subset]) -> Tensor:
        """(P,) float64 on the CPU; NaN where a feature is not finite."""
        images = torch.cat([features for _, features in draws], 1)
        return own_rewards(images, lambda own: self.reference.pool(own.to(self.device)).distance)


def kid_subset(source: RewardSource) -> SubsetKernel:
    """The kernel of KID, (x·y/D + 1)³."""
    return SubsetKernel(source, cubic_kernel, _features(source))


def kid_full(source: RewardSource) -> FullKernel:
    """The kernel of KID, (x·y/D + 1)³."""
    return FullKernel(source, cubic_kernel, _features(source))


def mmd_subset(source: RewardSource) -> SubsetKernel:
    """A Gaussian kernel as wide as the median distance between real images."""
    features = _features(source)
    return SubsetKernel(source, RBFKernel(median_bandwidth(features)), features)


def mmd_full(source: RewardSource) -> FullKernel:
    """A Gaussian kernel as wide as the median distance between real images."""
    features = _features(source)
    return FullKernel(source, RBFKernel(median_bandwidth(features)), features)


def _features(source: RewardSource) -> Tensor:
    features = source.reference.require_features(source.name, source.path)
    return features.to(source.device)
