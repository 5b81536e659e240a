"""The pool, and rewards by Fréchet distance in it: exact, first-order, and of own images alone.

Each is built from a `RewardSource`, works on the device it names, and prepares a pool once for
all candidates that are measured in it (arXiv:2607.02291).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from merge_rl.core.distances.frechet_pool import TOLERANCE, FrechetPool, Influence, ReferenceFactor
from merge_rl.core.distances.statistics import FeatureStats, feature_stats, replace_rows
from merge_rl.errors import about
from merge_rl.workflows.reference import Reference


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

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor]) -> Pool:
        """The pool of a `state_dict`, with its moments: recomputed ones differ in the last bits."""
        features = tensors["pool.features"]
        stats = FeatureStats(len(features), tensors["pool.mean"], tensors["pool.cov"])
        return cls(features, tensors["pool.labels"], stats)

    def state_dict(self) -> dict[str, Tensor]:
        """All of it, by name."""
        return {
            "pool.features": self.features, "pool.labels": self.labels,
            "pool.mean": self.stats.mean, "pool.cov": self.stats.cov,
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self.labels)

    def replaced(self, rows: Tensor, features: Tensor) -> Pool:
        """The pool after replacing rows (n,) by features (n, D); this one is left as it is.

        The moments follow by a change of rank 2n + 1, not from N rows.
        """
        if len(rows) == len(self):
            stats = feature_stats(features)  # nothing of the old moments is left to update
        else:
            stats = replace_rows(self.stats, self.features[rows], features)
        return Pool(self.features.index_copy(0, rows, features), self.labels, stats)

    def columns(self, start: int, stop: int) -> Pool:
        """The pool with the feature columns start..stop-1 alone."""
        if (start, stop) == (0, self.stats.dim):
            return self
        block = slice(start, stop)
        cov = self.stats.cov[block, block].contiguous()
        stats = FeatureStats(self.stats.count, self.stats.mean[block].contiguous(), cov)
        return Pool(self.features[:, block].contiguous(), self.labels, stats)


def pool_gap(before: float, after: float, share: float) -> float:
    """How far a pool lags behind the policy: relative, first order, noise aside 0 on policy.

        gap = (distance after a refresh - distance before) / (share refreshed * distance before)

    Fresh images of an on-policy pool change its distance by chance alone. If they make it clearly
    worse, the pool had been selected to compensate errors that the policy no longer makes: its
    distance, and the rewards measured in it, look better than the policy is. Comparing within one
    pool keeps N equal; the distance of a small fresh sample alone would be biased upward.

    0 where the distance before is not above 0, as unbiased kernel distances need not be: nothing
    is relative to that.
    """
    return (after - before) / (share * before) if before > 0 else 0.0


T = TypeVar("T")
Subset = tuple[Tensor, Tensor]
"""Rows (n,) of the pool, and the features (P, n, D) that P candidates have for them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RewardSource:
    """What a reward is constructed from: its name, the reference, the device."""

    name: str  # as it was asked for
    reference: Reference
    path: str = "reference"  # of the reference, for messages
    device: str = "cpu"
    heldout: Reference | None = None  # the other real images
    spans: tuple[tuple[int, int], ...] = ()  # columns of each encoder; (): there is one

    def stats(self) -> FeatureStats:
        """The reference's moments on the device."""
        return stats_on(self.reference.stats, self.device)


class PoolCache(Generic[T]):
    """Cache of what `make` gave for the last pool.

    `make` is a method of the reward that holds this one: a reward with a function without a name
    could not be sent to another process.
    """

    def __init__(self, make: Callable[[Pool], T]) -> None:
        self._make = make
        self._last: tuple[Pool, T] | None = None

    def __call__(self, pool: Pool) -> T:
        if self._last is None or self._last[0] is not pool:
            self._last = (pool, self._make(pool))
        return self._last[1]


class FrechetReward:
    """What the rewards by Fréchet distance share: the prepared reference, and pools of it."""

    def __init__(self, source: RewardSource) -> None:
        self.device = source.device
        with about(source.path):
            self.reference = ReferenceFactor.from_stats(source.stats())
        self.prepared = PoolCache(self._prepare)

    def _prepare(self, pool: Pool) -> FrechetPool:
        return self.reference.pool(stats_on(pool.stats, self.device))

    def pool_distance(self, pool: Pool) -> float:
        """FID of the pool itself."""
        return self.prepared(pool).distance

    def distance_of(self, features: Tensor) -> float:
        """FID of features (n, D) on their own."""
        return self.reference.distance_of(features.to(self.device))

    def state_dict(self, _pool: Pool) -> dict[str, Tensor]:
        """Nothing: all follows from the pool's moments."""
        return {}

    def load_state_dict(self, _pool: Pool, _state: Mapping[str, Tensor]) -> None:
        """Nothing to do."""


class SubsetFrechet(FrechetReward):
    """R = - FID[(pool without the subset) + fresh images, reference] (equation 4), exact."""

    def __init__(self, source: RewardSource) -> None:
        super().__init__(source)
        self.influence = PoolCache(self._influence)
        self.by_eigenvalues = self._checked = False

    def _influence(self, pool: Pool) -> Influence:
        return Influence.of(self.prepared(pool))

    def rewards(self, pool: Pool, draws: Sequence[Subset]) -> Tensor:
        """Mean over draws, Ns subsets x Nr replacements (equation 10): (P,) float64 on the CPU.

        NaN where a feature is not finite: a failed candidate is data, and ranks last.
        """
        prepared = self.prepared(pool)
        parts = []
        for rows, features in draws:
            removed = pool.features[rows].to(self.device)
            parts.append(-self._distances(prepared, removed, features.to(self.device)).cpu())
        return torch.stack(parts).mean(0)

    def _distances(self, prepared: FrechetPool, removed: Tensor, added: Tensor) -> Tensor:
        """Distances (P,), of which the first of all is checked against the slower way.

        The bound on the error of the quicker way vouches for its mathematics, not for the linear
        algebra library that it runs on.
        """
        found = prepared.distances_with(removed, added, by_eigenvalues=self.by_eigenvalues)
        first = found.isfinite().nonzero()[:1, 0]
        if self._checked or not (prepared.updatable and len(first)):
            return found
        self._checked = True
        exact = prepared.distances_with(removed, added[first], by_eigenvalues=True)
        off = float((found[first] - exact).abs() / exact.clamp(min=1e-300))
        if off <= TOLERANCE:
            return found
        warnings.warn(
            f"updated distances are off by {off:.1e} on {self.device}, from now on every one is "
            "computed from eigenvalues", RuntimeWarning, stacklevel=2,
        )  # fmt: skip
        self.by_eigenvalues = True
        return prepared.distances_with(removed, added, by_eigenvalues=True)


class InfluenceFrechet(SubsetFrechet):
    """The same reward to first order: R = - FID(pool) - (sum of IF(new) - IF(old)) / N.

    `merge_rl.core.distances.frechet_pool` has IF. A candidate costs one product of its features
    with a matrix, and every image has a reward of its own.
    """

    def exact(self, pool: Pool, draws: Sequence[Subset]) -> Tensor:
        """The exact rewards that `rewards` approximates, (P,) float64 on the CPU."""
        return super().rewards(pool, draws)

    def rewards(self, pool: Pool, draws: Sequence[Subset]) -> Tensor:
        """Mean over images and draws, (P,) float64 on the CPU; NaN where one is not finite."""
        parts = [self.per_image(pool, rows, features).mean(1) for rows, features in draws]
        return torch.stack(parts).mean(0)

    def per_image(self, pool: Pool, rows: Tensor, features: Tensor) -> Tensor:
        """Rewards (P, n) float64 of single images: features (P, n, D) in place of rows (n,).

        An image's reward is that of a candidate all of whose images changed the distance as this
        one does: the mean over n is the candidate's reward.
        """
        removed = pool.features[rows].to(self.device)
        shares = self.influence(pool).shares(removed, features.to(self.device))
        return -self.pool_distance(pool) - len(rows) * shares.cpu()


class FullFrechet(FrechetReward):
    """R = - FID[a candidate's own images, reference]; the pool serves to watch the search alone.

    The images of all draws are taken together, Ns Nr n of them. FID of few images is biased upward,
    by about the same amount for all candidates: compare them, not their values with other FIDs.
    """

    def rewards(self, _pool: Pool, draws: Sequence[Subset]) -> Tensor:
        """(P,) float64 on the CPU; NaN where a feature is not finite."""
        images = torch.cat([features for _, features in draws], 1)
        return own_rewards(images, lambda own: self.reference.distance_of(own.to(self.device)))


def own_rewards(images: Tensor, distance: Callable[[Tensor], float]) -> Tensor:
    """Minus the distance of each candidate's images (P, n, D): (P,), NaN if one is not finite."""
    values = [-distance(own) if bool(own.isfinite().all()) else torch.nan for own in images]
    return torch.tensor(values, dtype=torch.float64)


def stats_on(stats: FeatureStats, device: str) -> FeatureStats:
    """The moments on a device."""
    return FeatureStats(stats.count, stats.mean.to(device), stats.cov.to(device))
