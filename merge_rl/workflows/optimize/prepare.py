"""What stands before a search: names that are known, one batch for all, what it will cost."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Final

from merge_rl import registry
from merge_rl.config import AUTO_BATCH, OptimizeConfig, SamplerConfig, to_mapping
from merge_rl.core.sampling.compatibility import (
    balanced_labels,
    require_reward_solver,
    require_solver,
)
from merge_rl.parallel.group import Group
from merge_rl.storage.checkpoints import CheckpointSet
from merge_rl.storage.runs import RunDir, goes_on
from merge_rl.workflows.assembly import (
    Job,
    check_reward,
    fit_batch,
    require_known,
    require_known_autoencoder,
    require_tuning,
    searcher_note,
)
from merge_rl.workflows.optimize.workload import Workload, job_workload
from merge_rl.workflows.report import duration
from merge_rl.workflows.rollout import (
    DistributedRollout,
    Rollout,
    calls_an_image,
    on_device,
    require_same_everywhere,
)

ENOUGH: Final = 0.1  # seconds that a measurement takes, where there are images for it
STEPS: Final = (2, 4)  # of Euler, between which a network call is taken


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
    found = [cost_note(load, each), *job.checkpoints.notes, mixed_note(asked, job.checkpoints)]
    found.append(searcher_note(asked, resolved))
    return [text for text in found if text]


def cost_note(load: Workload, image_seconds: float | None) -> str:
    """All that will be generated, by what it goes to, and about how long that takes if known."""
    sums: dict[str, int] = {}
    for stage in load.stages:
        sums[stage.name] = sums.get(stage.name, 0) + stage.total
    parts = ", ".join(f"{name} {count:,}" for name, count in sums.items())
    thrice = "; an image with its gradient counts as three" if load.gradients else ""
    time = "" if image_seconds is None else f", about {duration(image_seconds * load.images)}"
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


def image_seconds(rollout: Rollout, num_classes: int, most: int) -> float:
    """Seconds that an image takes, about: from few steps of as few images as can be measured."""

    def seconds(steps: int, count: int) -> float:
        sampler = dataclasses.replace(rollout.sampler, solver="euler", num_steps=steps)
        quick = rollout.with_sampler(sampler)
        began = time.perf_counter()
        quick.features(quick.noise(range(count)), balanced_labels(count, num_classes))
        return time.perf_counter() - began

    few, many = STEPS
    count = min(8, most)
    seconds(few, count)  # the first call sets things up
    while count < most and seconds(many, count) < ENOUGH:
        count = min(2 * count, most)
    short, long = seconds(few, count), seconds(many, count)
    call = max(0.0, long - short) / (many - few)
    calls = calls_an_image(rollout.sampler, rollout.model)
    return (call * calls + max(0.0, short - few * call)) / count
