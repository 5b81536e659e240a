"""Distribution-wise rewards of a pool of features, alone and as weighted sums."""

from merge_rl.workflows.rewards.frechet import InfluenceFrechet, Pool, RewardSource, pool_gap
from merge_rl.workflows.rewards.mean import columns, real_distances
from merge_rl.workflows.rewards.subset_reward import (
    Level,
    RewardGradient,
    SubsetReward,
    require_gradient,
)
from merge_rl.workflows.rewards.sum import (
    KEY,
    CombinedExtractor,
    FirstOrderWatch,
    RewardScores,
    RewardSum,
    WeightedReward,
    first_order_line,
    first_order_warnings,
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
