"""Scores of a round's candidates: images of all, on the same rows, labels and noise.

Common random numbers: what differs between candidates is then what their weights do, and not the
luck of their images. Every round draws new ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from merge_rl.config import RewardConfig
from merge_rl.rng import image_seeds, stream
from merge_rl.workflows.assemble import Job
from merge_rl.workflows.pool import Pool, draw_subset
from merge_rl.workflows.reward_sum import Scores
from merge_rl.workflows.rollout import WorkItem


def score_candidates(
    job: Job, pool: Pool | None, thetas: Tensor, reward: RewardConfig, *, seed: int, index: int
) -> Scores:
    """Rewards (P,) of thetas (P, D) in round `index`, higher is better, NaN for those that failed.

    P `reward.images_per_candidate` images are made.
    """
    draws = []
    for s in range(reward.num_subsets):
        rows = _rows(pool, reward.images_per_subset, seed, index, s)
        for r in range(reward.num_replacements):
            draws.append((rows, image_seeds(len(rows), seed, "round", index, s, r)))
    candidates = [job.map(theta) for theta in thetas]
    classes = max(job.num_classes, 1)  # which take turns, as in the pool
    items = [WorkItem(c, seeds, rows % classes) for c in candidates for rows, seeds in draws]
    made = job.rollout.features_of(items, f"round {index}")
    # All candidates at once: most of what a distance costs is the same for all of them.
    scored = [(rows, torch.stack(made[i :: len(draws)])) for i, (rows, _) in enumerate(draws)]
    return job.reward.scores(pool, scored)


def penalties(job: Job, thetas: Tensor, reward: RewardConfig, l2: float) -> Tensor:
    """What large coefficients cost each candidate, (P,), in units of its reward.

    l2 is in FID: where a candidate moves a part of the pool alone, it counts for that part.
    """
    if l2 == 0:
        return torch.zeros(len(thetas), dtype=torch.float64)
    share = reward.images_per_subset / reward.pool_size if reward.pooled else 1.0
    rows = torch.stack([job.map(theta) for theta in thetas])
    return l2 * share * rows.square().sum(2).mean(1)


def _rows(pool: Pool | None, count: int, seed: int, index: int, subset: int) -> Tensor:
    """Rows of the pool that a candidate's images stand for; without a pool, just numbers."""
    if pool is None:
        return torch.arange(count)
    return draw_subset(pool.labels, count, stream(seed, "subset", index, subset))
