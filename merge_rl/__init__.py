"""Find the best way to merge the checkpoints of a diffusion training run.

The public names are imported on first use, so that `import merge_rl` is quick and does not load
torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from merge_rl.late import offered
from merge_rl.version import __version__

if TYPE_CHECKING:
    from merge_rl.config import (
        EvaluateConfig,
        EvaluationConfig,
        FinetuneConfig,
        MergeConfig,
        OptimizeConfig,
        RewardConfig,
        SamplerConfig,
        SearchConfig,
    )
    from merge_rl.core.distances.frechet import frechet_distance
    from merge_rl.core.distances.kernels import kernel_distance
    from merge_rl.core.distances.neighbours import prdc
    from merge_rl.core.distances.statistics import FeatureStats, feature_stats
    from merge_rl.core.network import Network
    from merge_rl.core.sampling.description import describe
    from merge_rl.core.sampling.sampler import sample
    from merge_rl.errors import MergeRLError
    from merge_rl.progress import LineTracker
    from merge_rl.registry import build_model
    from merge_rl.rng import seeded_noise
    from merge_rl.searchers import Searcher
    from merge_rl.storage.checkpoints import CheckpointSet
    from merge_rl.storage.convert import ConvertResult
    from merge_rl.storage.hub import convert, open_checkpoints
    from merge_rl.workflows.assembly import load_model
    from merge_rl.workflows.compare import compare_searchers
    from merge_rl.workflows.evaluate import evaluate
    from merge_rl.workflows.export import MergedModel, merge, push, save_model
    from merge_rl.workflows.finetune import FinetuneResult, finetune
    from merge_rl.workflows.finetune.resume import resume
    from merge_rl.workflows.optimize import OptimizeResult, optimize
    from merge_rl.workflows.optimize.function import search
    from merge_rl.workflows.rewards import SubsetReward


_HOMES: Final = {
    "config": (
        "EvaluateConfig EvaluationConfig FinetuneConfig MergeConfig OptimizeConfig RewardConfig "
        "SamplerConfig SearchConfig"
    ),
    "core.distances.frechet": "frechet_distance",
    "core.distances.kernels": "kernel_distance",
    "core.distances.neighbours": "prdc",
    "core.distances.statistics": "FeatureStats feature_stats",
    "core.network": "Network",
    "core.sampling.sampler": "sample",
    "core.sampling.description": "describe",
    "errors": "MergeRLError",
    "progress": "LineTracker",
    "registry": "build_model",
    "rng": "seeded_noise",
    "searchers": "Searcher",
    "storage.checkpoints": "CheckpointSet",
    "storage.convert": "ConvertResult",
    "storage.hub": "convert open_checkpoints",
    "workflows.assembly": "load_model",
    "workflows.compare": "compare_searchers",
    "workflows.evaluate": "evaluate",
    "workflows.export": "MergedModel merge push save_model",
    "workflows.finetune": "FinetuneResult finetune",
    "workflows.finetune.resume": "resume",
    "workflows.optimize": "OptimizeResult optimize",
    "workflows.optimize.function": "search",
    "workflows.rewards": "SubsetReward",
}

__all__ = [
    "CheckpointSet",
    "ConvertResult",
    "EvaluateConfig",
    "EvaluationConfig",
    "FeatureStats",
    "FinetuneConfig",
    "FinetuneResult",
    "LineTracker",
    "MergeConfig",
    "MergeRLError",
    "MergedModel",
    "Network",
    "OptimizeConfig",
    "OptimizeResult",
    "RewardConfig",
    "SamplerConfig",
    "SearchConfig",
    "Searcher",
    "SubsetReward",
    "__version__",
    "build_model",
    "compare_searchers",
    "convert",
    "describe",
    "evaluate",
    "feature_stats",
    "finetune",
    "frechet_distance",
    "kernel_distance",
    "load_model",
    "merge",
    "open_checkpoints",
    "optimize",
    "prdc",
    "push",
    "resume",
    "sample",
    "save_model",
    "search",
    "seeded_noise",
]


def __getattr__(name: str) -> Any:
    return offered(__name__, name, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
