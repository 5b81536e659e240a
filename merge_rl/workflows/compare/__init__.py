"""Several searchers and seeds at one budget, scored on fresh seeds that all share."""

from merge_rl.workflows.compare.run import compare_searchers

__all__ = ["compare_searchers"]
