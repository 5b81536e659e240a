"""Where a fine-tuning run is, as a value, and its way to a resume point and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from merge_rl.core.distances.statistics import FeatureStats
from merge_rl.storage.files import below
from merge_rl.workflows.finetune.learner import Learner
from merge_rl.workflows.rewards import Pool, RewardSum


@dataclass(frozen=True, eq=False)
class LoopState:
    """Where a run is, beside its weights: replaced as a whole, never altered."""

    step: int = 0  # finished steps, skipped ones among them
    images: int = 0  # generated for training: rollouts and pools
    pool: Pool | None = None
    pool_step: int = -1  # the step that the pool was brought up to date at
    failures: int = 0  # skipped steps in a row, up to now
    skipped: int = 0  # skipped steps of the whole run

    def advanced(self, images: int) -> LoopState:
        """After a step that was made, of so many images."""
        return dataclasses.replace(
            self, step=self.step + 1, failures=0, images=self.images + images
        )

    def passed_over(self) -> LoopState:
        """After a step that was skipped."""
        return dataclasses.replace(
            self, step=self.step + 1, failures=self.failures + 1, skipped=self.skipped + 1
        )

    def before_failures(self) -> LoopState:
        """As if the skipped steps of the present row had not been tried."""
        row = self.failures
        return dataclasses.replace(
            self, step=self.step - row, failures=0, skipped=self.skipped - row
        )


def pack_state(
    state: LoopState, learner: Learner, reward: RewardSum
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and plain values of a resume point: with the settings all that a run depends on.

    No generator is among them: every draw follows from the seed, the step and the image.
    """
    tensors = {f"learner.{k}": v for k, v in learner.state_dict().items()}
    values: dict[str, Any] = {
        item.name: getattr(state, item.name)
        for item in dataclasses.fields(state) if item.name != "pool"
    }  # fmt: skip
    if state.pool is not None:
        pool = state.pool
        tensors |= {"pool.features": pool.features, "pool.labels": pool.labels}
        tensors |= {"pool.mean": pool.stats.mean, "pool.cov": pool.stats.cov}
        tensors |= {f"reward.{k}": v for k, v in reward.state_dict(pool).items()}
    return tensors, {**values, "updates": learner.updates}


def unpack_state(
    tensors: Mapping[str, Tensor], values: Mapping[str, Any], learner: Learner, reward: RewardSum
) -> LoopState:
    """The state of a resume point; the learner's weights and optimizer are set to it.

    KeyError, TypeError or RuntimeError for a resume point of something else.
    """
    pool = None
    if "pool.features" in tensors:
        features = tensors["pool.features"]
        # The moments as they were: recomputed, they end in other last bits.
        stats = FeatureStats(len(features), tensors["pool.mean"], tensors["pool.cov"])
        pool = Pool(features, tensors["pool.labels"], stats)
        reward.load_state_dict(pool, below(tensors, "reward."))
    learner.load_state_dict(below(tensors, "learner."), values["updates"])
    known = {item.name for item in dataclasses.fields(LoopState)} - {"pool"}
    return LoopState(pool=pool, **{name: values[name] for name in known})
