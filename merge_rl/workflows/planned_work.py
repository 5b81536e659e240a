"""The stages of a search, counted from its settings as the search itself counts them."""

from __future__ import annotations

import dataclasses

from merge_rl.config import OptimizeConfig
from merge_rl.core.tournament import Rung, halving_plan
from merge_rl.core.workload import SDE, Stage, Workload
from merge_rl.storage.checkpoints import CheckpointSet
from merge_rl.workflows.assemble import build_map
from merge_rl.workflows.budget import FINALISTS, LEAST, BudgetPlan, plan_budget
from merge_rl.workflows.comparison import ENTRIES
from merge_rl.workflows.starts import starts_of


def search_workload(
    config: OptimizeConfig, checkpoints: CheckpointSet, num_groups: int, *, also_sde: bool = False
) -> Workload:
    """The workload of `optimize` with a resolved config.

    What a search decides on its way is not in it: a second refresh when the pool lags behind,
    finalists that are the same, a searcher that ends early or asks for more in later rounds.
    `also_sde`: the comparison is repeated under the SDE. Raises BudgetError as the search would.
    """
    budget = plan_budget(config, _count_starts(config, checkpoints, num_groups))
    final, entries = config.evaluation, FINALISTS + config.search.incumbents
    last = halving_plan(entries, budget.final, LEAST) if budget.final else ()
    rounds, search = _rounds(config, budget)
    stages = [
        *_rungs("start", budget.start),
        *search,
        *_rungs("finalists", last),
        *([Stage("finalists", 1, 1, last[-1].images)] if last else []),  # the winner once more
        Stage("best single", 1, len(checkpoints), final.selection_images),
        Stage("comparison", 1, len(ENTRIES) * final.repeats, final.num_images),
    ]
    if also_sde:
        stages.append(Stage("comparison, SDE", 1, 2 * final.repeats, final.num_images, SDE))
    scored = [s.items for s in stages if s.name not in ("pool", "candidates", "refresh")]
    return Workload(tuple(stage for stage in stages if stage.total), rounds, sum(scored))


def _rounds(config: OptimizeConfig, budget: BudgetPlan) -> tuple[int, list[Stage]]:
    """How many rounds the budget pays for, and the stages of all of them."""
    reward = config.reward
    left = budget.limit - sum(rung.entries * rung.images for rung in budget.start) - budget.pool
    rounds, refreshes = 0, dict[int, int]()
    while True:
        refresh = reward.refresh_images(rounds) if reward.pooled else 0
        cost = budget.candidates * reward.images_per_candidate + refresh
        if cost > left:
            break
        left, rounds = left - cost, rounds + 1
        refreshes[refresh] = refreshes.get(refresh, 0) + 1
    draws = reward.num_subsets * reward.num_replacements
    return rounds, [
        Stage("pool", 1, 1, budget.pool),
        Stage("candidates", rounds, budget.candidates * draws, reward.images_per_subset),
        *(Stage("refresh", times, 1, images) for images, times in refreshes.items()),
    ]


def _rungs(name: str, rungs: tuple[Rung, ...]) -> list[Stage]:
    return [Stage(name, 1, rung.entries, rung.images) for rung in rungs]


def _count_starts(config: OptimizeConfig, checkpoints: CheckpointSet, num_groups: int) -> int:
    # Whitened coefficients reach what affine ones do, and these need no look at the weights.
    merge = config.merge
    if merge.map == "whitened":
        merge = dataclasses.replace(merge, map="affine")
    return len(starts_of(config, checkpoints, build_map(checkpoints, merge, num_groups)))
