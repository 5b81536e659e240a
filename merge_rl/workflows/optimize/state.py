"""The state of a search as one value, its best candidates so far, and its held-out curve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merge_rl.core.distances.frechet import FrechetReference
from merge_rl.storage.files import below, counts_of
from merge_rl.storage.runs import RunDir
from merge_rl.workflows.assembly import Job
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
            tensors |= self.pool.state_dict()
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
        read, KeyError, TypeError or ValueError for one that lacks something.
        """
        saved = run.load_state()
        if saved is None:
            return None
        tensors, scalars = saved
        counts = counts_of(scalars, "round_index", "images", "cursor", "failed_rounds")
        return cls(
            round_index=counts["round_index"],
            images=counts["images"],
            cursor=counts["cursor"],
            gap_mean=float(scalars["gap_mean"]),
            failed_rounds=counts["failed_rounds"],
            result_theta=tensors["result_theta"],
            incumbents=incumbents.restored(tensors),
            searcher={"tensors": below(tensors, "searcher."), "scalars": scalars["searcher"]},
            pool=Pool.restored(tensors) if pooled else None,
            reward=below(tensors, "reward."),
        )


@dataclass(frozen=True, eq=False)
class BestSoFar:
    """At most `limit` candidates with the best scores, best first, those of late rounds ahead.

    A score is a single look, and the best of many are mostly lucky: they are entries for the final
    choice, not results. An early candidate, drawn about an early mean, gives way to any late one.
    """

    thetas: Tensor  # (M, D) float64
    scores: Tensor  # (M,) float64, see `candidate_scores`
    late: Tensor  # (M,) bool
    limit: int

    @classmethod
    def empty(cls, dim: int, limit: int) -> BestSoFar:
        """None yet."""
        none = torch.zeros(0, dtype=torch.float64)
        return cls(none.reshape(0, dim), none, none.bool(), limit)

    def with_round(self, thetas: Tensor, scores: Tensor, *, late: bool) -> BestSoFar:
        """After a round of thetas (P, D) with scores (P,); failed ones (NaN) never enter."""
        sound = scores.isfinite()
        merged = torch.cat([self.thetas, thetas[sound]])
        values = torch.cat([self.scores, scores[sound]])
        when = torch.cat([self.late, torch.full_like(scores[sound], late, dtype=torch.bool)])
        order = torch.argsort(values, descending=True, stable=True)
        order = order[torch.argsort(when[order].int(), descending=True, stable=True)]
        order = order[: self.limit]
        return BestSoFar(merged[order], values[order], when[order], self.limit)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors by name."""
        return {
            "incumbents.thetas": self.thetas,
            "incumbents.scores": self.scores,
            "incumbents.late": self.late.to(torch.uint8),
        }

    def restored(self, tensors: Mapping[str, Tensor]) -> BestSoFar:
        """Those of a saved state; a state that does not tell is of early rounds."""
        thetas, scores = tensors["incumbents.thetas"], tensors["incumbents.scores"]
        late = tensors.get("incumbents.late", torch.zeros_like(scores)).bool()
        return BestSoFar(thetas, scores, late, self.limit)


def candidate_scores(
    rewards: Tensor, pool_distance: float | None, share: float, *, relative: bool
) -> Tensor:
    """What rewards R (P,) of a round say of the candidates alone, to first order, (P,) -> (P,).

    Where a candidate's images replaced a share s of a pool of distance d,

        score = - (d + (-R - d) / s)        or, relative:    score = (R - mean R) / s

    with d = 0 and s = 1 for rewards of a candidate's own images. All candidates of a round share
    their noise, which moves the rewards of a round more than the candidates differ: scores of
    several rounds can be told apart only relative to their own round. A candidate that is alone in
    its round has nothing to be compared with, and its score is the first.
    """
    known = rewards[rewards.isfinite()]
    if relative and len(rewards) > 1:
        return (rewards - known.mean()) / share
    level = 0.0 if pool_distance is None else pool_distance
    return -(level + (-rewards - level) / share)


class HeldOutCurve:
    """Fréchet distance of the pool to held-out statistics, which no step of a search looks at.

    Only where the reward reads the features that these statistics are of.
    """

    def __init__(self, job: Job) -> None:
        own = job.rollout.rollout.extractor is job.final_rollout.rollout.extractor
        known = job.references.get("heldout") if own else None
        self._reference = None if known is None else FrechetReference.from_stats(known.stats)

    def of(self, pool: Pool | None) -> dict[str, float]:
        """For an event: {"heldout": FID}, or nothing."""
        if pool is None or self._reference is None:
            return {}
        return {"heldout": self._reference.distance(pool.stats)}
