"""What a search will make: its stages and their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merge_rl.config import OptimizeConfig
from merge_rl.core.sampling.compatibility import VELOCITY, prediction_of
from merge_rl.storage.checkpoints import CheckpointSet
from merge_rl.workflows.assembly import Job, unweighed_map
from merge_rl.workflows.evaluate import ENTRIES
from merge_rl.workflows.optimize.budget import (
    AGAIN,
    FINALISTS,
    LEAST,
    BudgetPlan,
    Rung,
    plan_budget,
    tournament_rounds,
)
from merge_rl.workflows.optimize.search import starts_of
from merge_rl.workflows.optimize.shown import picture_layout

ODE, SDE = "reward", "sde"


@dataclass(frozen=True)
class WorkStage:
    """Work that is handed out at once, `times` times: `items` of `images` images each."""

    name: str
    times: int
    items: int
    images: int
    sampler: str = ODE

    @property
    def total(self) -> int:
        """Images of all times."""
        return self.times * self.items * self.images

    @property
    def merges(self) -> int:
        """Merges on one device: one an item."""
        return self.times * self.items


@dataclass(frozen=True)
class Workload:
    """The stages of a search and of the comparison that ends it."""

    stages: tuple[WorkStage, ...]
    rounds: int
    scorings: int  # scores of whole sets of images in the comparison
    gradients: bool = False  # whether rounds make images with their gradient

    @property
    def images(self) -> int:
        """Images of all stages."""
        return sum(stage.total for stage in self.stages)

    @property
    def merges(self) -> int:
        """Merges of all stages on one device."""
        return sum(stage.merges for stage in self.stages)


def job_workload(config: OptimizeConfig, job: Job) -> Workload:
    """The workload of a search that is built."""
    rollout = job.final_rollout.rollout
    also_sde = prediction_of(rollout.model) == VELOCITY and not rollout.sampler.is_sde
    shape = job.parts.shape if job.parts.makes_images else None
    return search_workload(config, job.checkpoints, job.map.num_groups, shape, also_sde=also_sde)


def search_workload(
    config: OptimizeConfig,
    checkpoints: CheckpointSet,
    num_groups: int,
    shape: Sequence[int] | None,
    *,
    also_sde: bool = False,
) -> Workload:
    """The workload of `optimize` with a resolved config; samples have a shape, or are no images.

    What a search decides on its way is not in it: a second refresh when the pool lags behind,
    finalists that are the same, a searcher that ends early or asks for more in later rounds.
    `also_sde`: the comparison is repeated under the SDE. Raises BudgetError as the search would.
    """
    budget = plan_budget(config, _count_starts(config, checkpoints, num_groups))
    final, entries = config.evaluation, FINALISTS + config.search.incumbents
    last = tournament_rounds(entries, budget.final, LEAST) if budget.final else ()
    rounds, search = _rounds(config, budget)
    stages = [
        *_rungs("start", budget.start),
        *search,
        *_rungs("finalists", last),
        # Result and start once more, and the start on the seeds of the last round.
        *([WorkStage("optimism", 1, AGAIN, last[-1].images)] if last else []),
        WorkStage("best single", 1, len(checkpoints), final.selection),
        WorkStage("comparison", 1, len(ENTRIES) * final.repeats, final.images),
    ]
    if also_sde:
        stages.append(WorkStage("comparison, SDE", 1, 2 * final.repeats, final.images, SDE))
    if shape is not None:
        stages.append(WorkStage("pictures", 1, 2, picture_layout(config.autoencoder, shape)[0]))
    search_stages = ("pool", "candidates", "refresh", "gradients", "pictures")
    scored = [s.items for s in stages if s.name not in search_stages]
    return Workload(
        tuple(stage for stage in stages if stage.total), rounds, sum(scored),
        gradients=config.search.takes_gradients,
    )  # fmt: skip


def _rounds(config: OptimizeConfig, budget: BudgetPlan) -> tuple[int, list[WorkStage]]:
    """How many rounds the budget pays for, and the stages of all of them."""
    reward = config.reward
    left = budget.limit - sum(rung.entries * rung.images for rung in budget.start) - budget.pool
    rounds, refreshes = 0, dict[int, int]()
    while True:
        cost = config.round_images(budget.candidates, rounds)
        refresh = cost - budget.candidates * reward.images_per_candidate
        if cost > left:
            break
        left, rounds = left - cost, rounds + 1
        refreshes[refresh] = refreshes.get(refresh, 0) + 1
    pool = WorkStage("pool", 1, 1, budget.pool)
    if config.search.takes_gradients:
        return rounds, [pool, WorkStage("gradients", rounds, 1, budget.round)]
    draws = reward.num_subsets * reward.num_replacements
    return rounds, [
        pool,
        WorkStage("candidates", rounds, budget.candidates * draws, reward.images_per_subset),
        *(WorkStage("refresh", times, 1, images) for images, times in refreshes.items()),
    ]


def _rungs(name: str, rungs: tuple[Rung, ...]) -> list[WorkStage]:
    return [WorkStage(name, 1, rung.entries, rung.images) for rung in rungs]


def _count_starts(config: OptimizeConfig, checkpoints: CheckpointSet, num_groups: int) -> int:
    return len(starts_of(config, checkpoints, unweighed_map(checkpoints, config.merge, num_groups)))
