"""Metrics of a model on fresh seeds, with intervals, and comparisons of models."""

from merge_rl.workflows.evaluate.features import sampler_summary, samplers_of
from merge_rl.workflows.evaluate.final_scores import (
    ENTRIES,
    Comparison,
    SamplerComparison,
    SecondScores,
    compare,
    comparison_from,
)
from merge_rl.workflows.evaluate.run import evaluate, require_scorable
from merge_rl.workflows.evaluate.score_store import Request, Scorer, ScoreStore, SecondMetric

__all__ = [
    "ENTRIES",
    "Comparison",
    "Request",
    "SamplerComparison",
    "ScoreStore",
    "Scorer",
    "SecondMetric",
    "SecondScores",
    "compare",
    "comparison_from",
    "evaluate",
    "require_scorable",
    "sampler_summary",
    "samplers_of",
]
