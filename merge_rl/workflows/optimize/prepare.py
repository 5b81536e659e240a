"""What stands before a search: known names, one batch for all, what it will make and cost."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from merge_rl import registry
from merge_rl.config import AUTO_BATCH, OptimizeConfig, SamplerConfig, sde_counterpart, to_mapping
from merge_rl.core.sampling.compatibility import (
    VELOCITY,
    prediction_of,
    require_reward_solver,
    require_solver,
)
from merge_rl.parallel.group import Group
from merge_rl.progress import duration
from merge_rl.storage.checkpoints import CheckpointSet
from merge_rl.storage.runs import RunDir, goes_on
from merge_rl.workflows.assembly import (
    Job,
    auto_note,
    check_reward,
    fit_batch,
    require_known,
    require_known_autoencoder,
    require_tuning,
    tried_in_vain,
    unweighed_map,
    why_no_gradient,
)
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
from merge_rl.workflows.rollout import (
    DistributedRollout,
    Rollout,
    calls_an_image,
    image_seconds,
    on_device,
    require_same_everywhere,
)

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
    def by_name(self) -> dict[str, int]:
        """Images of the stages of each name."""
        sums: dict[str, int] = {}
        for stage in self.stages:
            sums[stage.name] = sums.get(stage.name, 0) + stage.total
        return sums

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
    if not budget.candidates:  # of a method that asks nothing
        return 0, []
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


def check_names(config: OptimizeConfig) -> None:
    """Raise before any work for names that are not known and solvers no reward can use."""
    registry.population_of(config.search)
    check_reward(config)
    if config.extractor is not None:
        require_known(config.extractor)
    if config.autoencoder is not None:
        require_known_autoencoder(config.autoencoder)
    sampler = config.sampler or SamplerConfig()
    require_solver(sampler.solver)
    require_reward_solver(sampler)
    require_tuning(config)


def distribute(
    group: Group,
    config: OptimizeConfig,
    job: Job,
    device: str,
    announce: Callable[[str], None],
) -> DistributedRollout:
    """The rollouts of a search on all ranks, which were seen to have the same of everything.

    Raises ParallelError for ranks of another version, other settings or inputs, or unequal
    devices.
    """
    require_same_everywhere(group, to_mapping(config), job.hashes, device)
    return DistributedRollout(group, (job.rollout, job.final_rollout), announce)


def common_batch(
    config: OptimizeConfig,
    checkpoints: CheckpointSet,
    group: Group,
    out: str | os.PathLike[str],
    announce: Callable[[str], None],
) -> OptimizeConfig:
    """The settings with the batch that rank 0's device has room for, where they leave it open.

    A run that goes on after a restart keeps the batch that it began with.
    """
    if config.batch != AUTO_BATCH:
        return config
    found = None
    if group.leads and goes_on(out, group.place) and RunDir(out).config_path.is_file():
        found = RunDir(out).config().batch
    elif group.leads:
        placed = on_device(config, group)
        found = fit_batch(placed, checkpoints, announce=announce).batch
    return dataclasses.replace(config, batch=group.broadcast(found, phase="choosing the batch"))


def opening_notes(
    asked: OptimizeConfig, resolved: OptimizeConfig, job: Job, ranks: int, *, timed: bool
) -> list[str]:
    """What a search says before it begins: its cost first, then what it took for granted.

    A function of the user's is not `timed`: it is called for what the search needs alone.
    """
    load, each = job_workload(resolved, job), None
    if timed:
        count = resolved.reward.images_per_subset
        each = image_seconds(job.rollout.rollout, job.num_classes, count) / ranks
    seconds = None if each is None else each * ode_images(load, job.final_rollout.rollout)
    found = [cost_note(load, seconds), *job.checkpoints.notes, mixed_note(asked, job.checkpoints)]
    if asked.search.name != resolved.search.name:
        auto = dataclasses.replace(resolved, search=asked.search)
        why = why_no_gradient(auto) or tried_in_vain(auto, job.checkpoints)
        found.append(auto_note(resolved.search.name, why))
    return [text for text in found if text]


def ode_images(load: Workload, rollout: Rollout) -> float:
    """Images of the ODE that take as long as all of the load: those of an SDE have more steps."""
    under_sde = sum(stage.total for stage in load.stages if stage.sampler == SDE)
    if not under_sde:
        return load.images
    own, other = rollout.sampler, sde_counterpart(rollout.sampler)
    calls = [calls_an_image(sampler, rollout.model) for sampler in (own, other)]
    return load.images + under_sde * (calls[1] / calls[0] - 1)


def cost_note(load: Workload, seconds: float | None) -> str:
    """All that will be generated, by what it goes to, and about how long that takes if known."""
    parts = ", ".join(f"{name} {count:,}" for name, count in load.by_name.items())
    thrice = "; an image with its gradient counts as three" if load.gradients else ""
    time = "" if seconds is None else f", about {duration(seconds)}"
    return f"{load.images:,} images in all{time} ({parts}{thrice})"


def mixed_note(config: OptimizeConfig, checkpoints: CheckpointSet) -> str | None:
    """Which tracks are searched together, where nobody asked for that."""
    sizes: dict[str, int] = {}
    for entry in checkpoints.entries:
        if entry.track:
            sizes[entry.track] = sizes.get(entry.track, 0) + 1
    if config.track is not None or config.select or len(sizes) < 2:
        return None
    named = " and ".join(f"{count} of {name}" for name, count in sizes.items())
    return f"searching {named} together; --track takes one series alone"


SMALL: Final = 64  # pixels a side, up to which more images are shown


def picture_layout(autoencoder: str | None, shape: Sequence[int]) -> tuple[int, int]:
    """Images and columns of a grid, by what decodes samples of a shape."""
    large = autoencoder is not None or max(shape[1:], default=0) > SMALL
    return (12, 4) if large else (30, 10)
