"""What a search will cost: images, calls, operations, memory, time."""

from merge_rl.workflows.plan.run import SearchPlan, plan

__all__ = ["SearchPlan", "plan"]
