"""The search for merging coefficients: starts, rounds, state, finalists."""

from merge_rl.workflows.optimize import function
from merge_rl.workflows.optimize.prepare import (
    SDE,
    Workload,
    WorkStage,
    check_names,
    search_workload,
)
from merge_rl.workflows.optimize.result import OptimizeResult
from merge_rl.workflows.optimize.run import optimize, optimize_set, require_first_round, resume
from merge_rl.workflows.optimize.search import SearchResult, run_search

__all__ = [
    "SDE",
    "OptimizeResult",
    "SearchResult",
    "WorkStage",
    "Workload",
    "check_names",
    "function",
    "optimize",
    "optimize_set",
    "require_first_round",
    "resume",
    "run_search",
    "search_workload",
]
