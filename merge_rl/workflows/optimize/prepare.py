"""What stands before a search: names that are known, one batch for all, equal ranks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

from merge_rl import registry
from merge_rl.config import AUTO_BATCH, OptimizeConfig, SamplerConfig, to_mapping
from merge_rl.core.sampling.compatibility import require_reward_solver, require_solver
from merge_rl.parallel.group import Group
from merge_rl.storage.checkpoints import CheckpointSet
from merge_rl.storage.runs import RunDir, goes_on
from merge_rl.workflows.assembly import (
    Job,
    check_reward,
    fit_batch,
    require_known,
    require_known_autoencoder,
)
from merge_rl.workflows.rollout import DistributedRollout, on_device, require_same_everywhere


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
