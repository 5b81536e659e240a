"""The state of a search as one value, and the best candidates so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merge_rl.core.distances.statistics import FeatureStats
from merge_rl.storage.runs import RunDir
from merge_rl.workflows.rewards import Pool


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchState:
    """The state of a search between two rounds."""

    round_index: int
    images: int
    cursor: int  # row of the pool that is renewed next
    gap_mean: float
    failed_rounds: int  # running
    result_theta: Tensor
    incumbents: BestSoFar
    searcher: Mapping[str, Any]  # its state_dict
    pool: Pool | None
    reward: Mapping[str, Tensor]  # its state_dict for this pool

    def save(self, run: RunDir) -> None:
        """Replace the resume point of a run."""
        tensors = {f"searcher.{k}": v for k, v in self.searcher["tensors"].items()}
        tensors |= {"result_theta": self.result_theta, **self.incumbents.state_dict()}
        if self.pool is not None:
            tensors |= {
                "pool.features": self.pool.features,
                "pool.labels": self.pool.labels,
                "pool.mean": self.pool.stats.mean,
                "pool.cov": self.pool.stats.cov,
            }
            tensors |= {f"reward.{k}": v for k, v in self.reward.items()}
        scalars = {
            "round_index": self.round_index,
            "images": self.images,
            "cursor": self.cursor,
            "gap_mean": self.gap_mean,
            "failed_rounds": self.failed_rounds,
            "searcher": self.searcher["scalars"],
        }
        run.save_state(tensors, scalars)

    @classmethod
    def load(cls, run: RunDir, incumbents: BestSoFar, *, pooled: bool) -> SearchState | None:
        """That of a run; None if there is none yet.

        `incumbents` are those of a search that begins. Raises RunError for a file that cannot be
        read, KeyError or TypeError for one that lacks something.
        """
        saved = run.load_state()
        if saved is None:
            return None
        tensors, scalars = saved
        return cls(
            round_index=scalars["round_index"],
            images=scalars["images"],
            cursor=scalars["cursor"],
            gap_mean=scalars["gap_mean"],
            failed_rounds=scalars["failed_rounds"],
            result_theta=tensors["result_theta"],
            incumbents=incumbents.restored(tensors),
            searcher={"tensors": _below(tensors, "searcher."), "scalars": scalars["searcher"]},
            pool=_pool_of(tensors) if pooled else None,
            reward=_below(tensors, "reward."),
        )


def _pool_of(tensors: Mapping[str, Tensor]) -> Pool:
    features = tensors["pool.features"]
    # The moments as they were, not recomputed: an update chain ends in other last bits.
    stats = FeatureStats(len(features), tensors["pool.mean"], tensors["pool.cov"])
    return Pool(features, tensors["pool.labels"], stats)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@dataclass(frozen=True, eq=False)
class BestSoFar:
    """At most `limit` candidates with the best scores, best first.

    A score is what a candidate's reward says of its own distance, to first order: where its images
    replaced a share s of a pool of distance d,

        score = - (d + (-R - d) / s)

    and R itself for rewards of a candidate's own images. A score is a single look, and the best of
    many are mostly lucky: they are entries for the final choice, not results.
    """

    thetas: Tensor  # (M, D) float64
    scores: Tensor  # (M,) float64
    limit: int

    @classmethod
    def empty(cls, dim: int, limit: int) -> BestSoFar:
        """None yet."""
        return cls(torch.zeros(0, dim, dtype=torch.float64), torch.zeros(0).double(), limit)

    def with_round(
        self, thetas: Tensor, rewards: Tensor, pool_distance: float | None, share: float
    ) -> BestSoFar:
        """After a round of thetas (P, D) with rewards (P,); failed ones (NaN) never enter."""
        level = 0.0 if pool_distance is None else pool_distance
        scores = -(level + (-rewards - level) / share)
        sound = scores.isfinite()
        merged = torch.cat([self.thetas, thetas[sound]])
        values = torch.cat([self.scores, scores[sound]])
        order = torch.argsort(values, descending=True, stable=True)[: self.limit]
        return BestSoFar(merged[order], values[order], self.limit)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by name."""
        return {"incumbents.thetas": self.thetas, "incumbents.scores": self.scores}

    def restored(self, tensors: Mapping[str, Tensor]) -> BestSoFar:
        """Those of a saved state."""
        return BestSoFar(tensors["incumbents.thetas"], tensors["incumbents.scores"], self.limit)
