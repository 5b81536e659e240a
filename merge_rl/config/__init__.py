"""Settings: dataclasses that are checked once, here, and their way to and from YAML."""

from merge_rl.config.finetune import (
    CURVES,
    FREE_ON_RESUME,
    PAPER_REWARD,
    FinetuneConfig,
    UpdateConfig,
    differing_keys,
)
from merge_rl.config.mapping import (
    dump_config,
    from_mapping,
    load_config,
    load_mapping,
    to_mapping,
    without_nan,
)
from merge_rl.config.optimize import (
    AUTO_BATCH,
    SUBSET_SIZE,
    EvaluationConfig,
    MergeConfig,
    OptimizeConfig,
    RewardConfig,
    SearchConfig,
    preset,
)
from merge_rl.config.overrides import overlaid, override, set_dotted, split_pair
from merge_rl.config.sampler import (
    DIFFUSIONS,
    FIXED_SOLVERS,
    LAST_STEPS,
    SDE_SOLVERS,
    SOLVERS,
    SamplerConfig,
    sde_counterpart,
)

__all__ = [
    "AUTO_BATCH",
    "CURVES",
    "DIFFUSIONS",
    "FIXED_SOLVERS",
    "FREE_ON_RESUME",
    "LAST_STEPS",
    "PAPER_REWARD",
    "SDE_SOLVERS",
    "SOLVERS",
    "SUBSET_SIZE",
    "EvaluationConfig",
    "FinetuneConfig",
    "MergeConfig",
    "OptimizeConfig",
    "RewardConfig",
    "SamplerConfig",
    "SearchConfig",
    "UpdateConfig",
    "differing_keys",
    "dump_config",
    "from_mapping",
    "load_config",
    "load_mapping",
    "overlaid",
    "override",
    "preset",
    "sde_counterpart",
    "set_dotted",
    "split_pair",
    "to_mapping",
    "without_nan",
]
