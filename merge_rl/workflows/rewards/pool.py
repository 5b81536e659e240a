"""The pool of generated images that a subset-replace reward is measured in (arXiv:2607.02291)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from merge_rl.core.distances.statistics import FeatureStats, feature_stats, replace_rows


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
        """The pool as those of its features see it that lie in columns start..stop-1."""
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
