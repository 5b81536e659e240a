"""What a search will cost: images, calls, operations, memory, time."""

from merge_rl.workflows.plan.run import Plan, plan

__all__ = ["Plan", "plan"]
