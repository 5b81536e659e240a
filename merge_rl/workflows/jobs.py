"""Built objects for several searches over one checkpoint set: what can be shared is."""

from __future__ import annotations

import dataclasses

from merge_rl.config import EvaluationConfig, OptimizeConfig, RewardConfig, SearchConfig
from merge_rl.storage.checkpoints import CheckpointSet
from merge_rl.workflows.assemble import Job, build_job
from merge_rl.workflows.reward_assembly import Target, build_reward
from merge_rl.workflows.rollout import MergedRollout
from merge_rl.workflows.weights import Announce


class Jobs:
    """Jobs for resolved configs over one set; one set of weights is held at a time.

    Searches that differ in searcher, reward, seed or budget work with the same network, weights,
    map and references. Each has a reward of its own: what one search left in it must not reach
    the next, which would then depend on what ran before it.
    """

    def __init__(self, checkpoints: CheckpointSet, announce: Announce) -> None:
        self._checkpoints, self._announce = checkpoints, announce
        self._last: tuple[OptimizeConfig, Job] | None = None

    def of(self, config: OptimizeConfig) -> Job:
        """The job of a config, its reward fresh."""
        shared = dataclasses.replace(
            config, seed=0, budget=1, search=SearchConfig(), reward=RewardConfig(),
            evaluation=EvaluationConfig(), extra_references={}, extra_weights={},
        )  # fmt: skip
        if self._last is None or self._last[0] != shared:
            self._last = None  # two sets of weights might not fit
            self._last = (shared, build_job(config, self._checkpoints, self._announce))
            return self._last[1]
        return with_reward(self._last[1], config, self._announce)


def with_reward(job: Job, config: OptimizeConfig, announce: Announce) -> Job:
    """The same job with the reward of another config."""
    final = job.final_rollout
    own = Target(
        extractor=final.rollout.extractor,
        reference=job.references["reference"],
        path=config.reference or "",
    )
    built = build_reward(config, own, announce)
    # Those of a reward's files have a name behind the kind.
    hashes = {kind: value for kind, value in job.hashes.items() if " " not in kind}
    return dataclasses.replace(
        job,
        rollout=MergedRollout(final.live, final.rollout.with_extractor(built.extractor)),
        reward=built.reward,
        hashes={**hashes, **built.hashes},
    )
