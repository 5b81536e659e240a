"""The search for merging coefficients: starts, rounds, state, finalists."""

from merge_rl.workflows.optimize.budget import (
    FINALISTS,
    LEAST,
    BudgetPlan,
    Rung,
    halving_plan,
    plan_budget,
)
from merge_rl.workflows.optimize.run import OptimizeResult, check_names, optimize, resume
from merge_rl.workflows.optimize.search import Found, make_searcher, run_search, starts_of

__all__ = [
    "FINALISTS",
    "LEAST",
    "BudgetPlan",
    "Found",
    "OptimizeResult",
    "Rung",
    "check_names",
    "halving_plan",
    "make_searcher",
    "optimize",
    "plan_budget",
    "resume",
    "run_search",
    "starts_of",
]
