"""Distribution-wise rewards of a pool of features, alone and as weighted sums."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from merge_rl.late import offered

if TYPE_CHECKING:
    from merge_rl.workflows.rewards.first_order import (
        KEY,
        FirstOrderWatch,
        first_order_line,
        first_order_warnings,
    )
    from merge_rl.workflows.rewards.frechet import InfluenceFrechet, Pool, RewardSource, pool_gap
    from merge_rl.workflows.rewards.mean import columns, real_distances
    from merge_rl.workflows.rewards.subset_reward import (
        Level,
        RewardGradient,
        SubsetReward,
        require_gradient,
    )
    from merge_rl.workflows.rewards.sum import (
        CombinedExtractor,
        RewardScores,
        RewardSum,
        WeightedReward,
        term_means,
    )

__all__ = [
    "KEY",
    "CombinedExtractor",
    "FirstOrderWatch",
    "InfluenceFrechet",
    "Level",
    "Pool",
    "RewardGradient",
    "RewardScores",
    "RewardSource",
    "RewardSum",
    "SubsetReward",
    "WeightedReward",
    "columns",
    "first_order_line",
    "first_order_warnings",
    "pool_gap",
    "real_distances",
    "require_gradient",
    "term_means",
]

# Each is loaded when it is asked for: what pages of runs need does without torch.
_HOMES: Final = {
    "first_order": "FirstOrderWatch KEY first_order_line first_order_warnings",
    "frechet": "InfluenceFrechet Pool RewardSource pool_gap",
    "mean": "columns real_distances",
    "subset_reward": "Level RewardGradient SubsetReward require_gradient",
    "sum": "CombinedExtractor RewardScores RewardSum WeightedReward term_means",
}


def __getattr__(name: str) -> Any:
    return offered(__name__, name, _HOMES)
