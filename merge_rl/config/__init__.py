"""Settings: dataclasses that are checked once, here, and their way to and from YAML."""

from merge_rl.config.evaluate import (
    MODEL_IMAGES,
    EvaluateConfig,
    GenerationConfig,
    SampleConfig,
)
from merge_rl.config.finetune import (
    FREE_ON_RESUME,
    PAPER_REWARD,
    TRACKERS,
    FinetuneConfig,
    differing_keys,
)
from merge_rl.config.inputs import FetchConfig, ReferenceConfig, SingleMergeConfig
from merge_rl.config.mapping import (
    dump_config,
    flattened,
    from_mapping,
    load_config,
    load_mapping,
    to_mapping,
    without_nan,
)
from merge_rl.config.numbers import EXAMPLES, real_number, whole_number
from merge_rl.config.optimize import (
    AUTO_BATCH,
    PRESETS,
    EvaluationConfig,
    OptimizeConfig,
    preset,
)
from merge_rl.config.overrides import overlaid, override, set_dotted, split_pair
from merge_rl.config.reward import SUBSET_SIZE, RewardConfig
from merge_rl.config.reward_terms import RewardTerm
from merge_rl.config.sampler import (
    DIFFUSIONS,
    FIXED_SOLVERS,
    LAST_STEPS,
    SDE_SOLVERS,
    SOLVERS,
    SamplerConfig,
    sde_counterpart,
)
from merge_rl.config.search import MergeConfig, SearchConfig
from merge_rl.config.setting import (
    LEARN,
    MODEL,
    PANELS,
    SCORES,
    SEARCH,
    About,
    Setting,
    settings_of,
)
from merge_rl.config.training import CURVES, UpdateConfig

__all__ = [
    "AUTO_BATCH",
    "CURVES",
    "DIFFUSIONS",
    "EXAMPLES",
    "FIXED_SOLVERS",
    "FREE_ON_RESUME",
    "LAST_STEPS",
    "LEARN",
    "MODEL",
    "MODEL_IMAGES",
    "PANELS",
    "PAPER_REWARD",
    "PRESETS",
    "SCORES",
    "SDE_SOLVERS",
    "SEARCH",
    "SOLVERS",
    "SUBSET_SIZE",
    "TRACKERS",
    "About",
    "EvaluateConfig",
    "EvaluationConfig",
    "FetchConfig",
    "FinetuneConfig",
    "GenerationConfig",
    "MergeConfig",
    "OptimizeConfig",
    "ReferenceConfig",
    "RewardConfig",
    "RewardTerm",
    "SampleConfig",
    "SamplerConfig",
    "SearchConfig",
    "Setting",
    "SingleMergeConfig",
    "UpdateConfig",
    "differing_keys",
    "dump_config",
    "flattened",
    "from_mapping",
    "load_config",
    "load_mapping",
    "overlaid",
    "override",
    "preset",
    "real_number",
    "sde_counterpart",
    "set_dotted",
    "settings_of",
    "split_pair",
    "to_mapping",
    "whole_number",
    "without_nan",
]
