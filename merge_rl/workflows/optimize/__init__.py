"""The search for merging coefficients: starts, rounds, state, finalists."""

from merge_rl.workflows.optimize import function
from merge_rl.workflows.optimize.budget import (
    FINALISTS,
    FRESH,
    LEAST,
    BudgetPlan,
    Rung,
    plan_budget,
    tournament_rounds,
)
from merge_rl.workflows.optimize.prepare import check_names
from merge_rl.workflows.optimize.result import OptimizeResult
from merge_rl.workflows.optimize.run import optimize, resume
from merge_rl.workflows.optimize.search import SearchResult, make_searcher, run_search, starts_of

__all__ = [
    "FINALISTS",
    "FRESH",
    "LEAST",
    "BudgetPlan",
    "OptimizeResult",
    "Rung",
    "SearchResult",
    "check_names",
    "function",
    "make_searcher",
    "optimize",
    "plan_budget",
    "resume",
    "run_search",
    "starts_of",
    "tournament_rounds",
]
