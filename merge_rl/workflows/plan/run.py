"""What a search will cost, before it starts: images, calls, FLOPs, bytes, memory, disk, time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from merge_rl import registry
from merge_rl.config import OptimizeConfig, SamplerConfig, sde_counterpart
from merge_rl.core.sampling.compatibility import VELOCITY, prediction_of
from merge_rl.errors import RunError
from merge_rl.interfaces import NullTracker, Tracker
from merge_rl.parallel.blocks import block_size
from merge_rl.storage.checkpoints import CheckpointSet
from merge_rl.storage.files import followed
from merge_rl.workflows.assembly import MemoryPlan, PartCosts, cost_parts, gib, plan_memory
from merge_rl.workflows.evaluate import Scorer
from merge_rl.workflows.optimize import SDE, Workload, search_workload
from merge_rl.workflows.plan import calibration
from merge_rl.workflows.plan.work import Estimate, Speeds, estimate, filling_batch
from merge_rl.workflows.rollout import calls_an_image, fast_hint, require_device

DEVICES: Final = (1, 8, 64)
REQUEST_SECONDS: Final = 0.005  # to hand out a round and take it up, on one machine
NETWORK_BYTES: Final = 1e9  # a second between machines; a cautious number for a cluster


@dataclass(frozen=True)
class SearchPlan:
    """The cost of a search; see `as_dict` for what of it is told."""

    config: OptimizeConfig
    workload: Workload
    calls: Mapping[str, int]  # network calls an image, by sampler
    flops: float
    merge_bytes: int  # read and written by all merges of one device
    gather_bytes: int  # of features that are sent to rank 0, at most
    memory: MemoryPlan
    disk: int
    disk_free: int
    feature_dim: int
    speeds: Speeds
    estimates: tuple[Estimate, ...]
    notes: tuple[str, ...]

    @property
    def network_calls(self) -> int:
        """Calls of the network for single images, the guide's or the null class's included."""
        calls = sum(stage.total * self.calls[stage.sampler] for stage in self.workload.stages)
        return calls * (2 if self.config.guided else 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "images": self.workload.images,
            "rounds": self.workload.rounds,
            "stages": self.workload.by_name,
            "merges": self.workload.merges,
            "network_calls": self.network_calls,
            "flops": self.flops,
            "bytes": {"merges": self.merge_bytes, "features gathered": self.gather_bytes},
            "memory": self.memory.as_dict(self.config.batch),
            "disk": {"needed": self.disk, "free": self.disk_free},
            "batch": self.config.batch,
            "spread": self.speeds.spread,
            "time": [
                {
                    "devices": e.devices, "seconds": e.seconds, "efficiency": e.efficiency,
                    "limit": e.limit, "stages": _by_name((s.stage.name, s.total) for s in e.stages),
                    "on rank 0 alone": e.serial,
                }
                for e in self.estimates
            ],
            "notes": list(self.notes),
        }  # fmt: skip


def _by_name(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, value in pairs:
        sums[name] = sums.get(name, 0) + value
    return sums


def plan(
    config: OptimizeConfig,
    checkpoints: CheckpointSet,
    *,
    out: str | os.PathLike[str] = ".",
    devices: Sequence[int] = DEVICES,
    memory: int | None = None,
    tracker: Tracker | None = None,
) -> SearchPlan:
    """The plan of `optimize` with a resolved config; nothing of the search runs.

    Args:
        config: as `resolve_config` gives it.
        checkpoints: the open set; its headers alone are read.
        out: where the run directory would lie.
        devices: numbers of devices to estimate the time for, each like this machine's.
        memory: bytes that a device has; by default what is free on this machine's.
        tracker: hears of progress.

    Raises OutOfMemoryError, with the largest batch that fits, if the batch does not, and
    RunError if the disk has no room.
    """
    tracker = tracker or NullTracker()
    require_device(config.device)
    costed = cost_parts(config, checkpoints, lambda text: tracker.event(_note(text)))
    sampler = config.sampler or SamplerConfig()
    also_sde = prediction_of(costed.rollout.model) == VELOCITY and not sampler.is_sde
    shape = costed.parts.shape
    workload = search_workload(config, checkpoints, costed.num_groups, shape, also_sde=also_sde)
    calls = {"reward": calls_an_image(sampler, costed.rollout.model), SDE: 0}
    if also_sde:
        calls[SDE] = calls_an_image(sde_counterpart(sampler), costed.rollout.model)
    found = plan_memory(config, checkpoints, costed, memory)
    found.require_fit(config.batch)
    dim = costed.dim
    disk, free = _disk(config, costed, dim), shutil.disk_usage(_existing(Path(out))).free
    if disk > free:
        raise RunError(f"{out}: the run needs {gib(disk)} on disk, {gib(free)} are free")
    speeds = _measure(config, checkpoints, costed, calls, Path(out), tracker)
    image_bytes = 4 * dim
    flops = sum(
        stage.total * (calls[stage.sampler] * costed.call_flops + costed.finishing_flops)
        for stage in workload.stages
    )
    merge_bytes = workload.merges * (checkpoints.total_bytes + 4 * costed.size)
    estimates = estimate(workload, devices, config.batch, speeds, image_bytes)
    return SearchPlan(
        config, workload, calls, flops, merge_bytes, workload.images * image_bytes, found, disk,
        free, dim, speeds, tuple(estimates), (*costed.notes, *_advice(config, workload, devices)),
    )  # fmt: skip


def _note(text: str) -> dict[str, str]:
    return {"kind": "note", "text": text}


def _existing(path: Path) -> Path:
    path = followed(path)
    while not path.is_dir():
        path = path.parent
    return path


def _state_bytes(config: OptimizeConfig, dim: int) -> int:
    """Of a resume point: features and labels of the pool, its moments."""
    return config.reward.pool_size * (4 * dim + 8) + 8 * dim * (dim + 1)


def _disk(config: OptimizeConfig, costed: PartCosts, dim: int) -> int:
    """Bytes of the run directory at its largest: a file is written beside the one it replaces."""
    return 2 * _state_bytes(config, dim) + 2 * 4 * costed.size


def _measure(
    config: OptimizeConfig,
    checkpoints: CheckpointSet,
    costed: PartCosts,
    calls: Mapping[str, int],
    out: Path,
    tracker: Tracker,
) -> Speeds:
    """Seconds of each part on this machine; some seconds of each."""
    tracker.phase("calibration", 5)
    parts, reward, final = costed.parts, config.reward, config.evaluation
    longest = max(reward.images_per_subset, min(4 * config.batch, final.images))
    images = calibration.time_images(costed.rollout, parts.num_classes, longest)
    block, image = images.of(calls["reward"])
    sde = images.of(calls[SDE])
    tracker.advance(1)
    dtype = next(i.dtype for i in checkpoints.tensors.values() if i.dtype.is_floating_point)
    merge = calibration.time_merge(len(checkpoints), costed.size, dtype, config.device)
    tracker.advance(1)
    draws = reward.num_subsets * reward.num_replacements
    scored = calibration.time_reward(
        parts.reward.reward, costed.moments, reward.pool_size, draws, reward.images_per_subset,
        registry.population_of(config.search), pooled=reward.pooled,
    )  # fmt: skip
    tracker.advance(1)
    moments = {name: reference.stats for name, reference in parts.references.items()}
    score = calibration.time_score(Scorer(moments), moments["reference"], final.images)
    tracker.advance(1)
    state = _state_bytes(config, costed.dim)
    write = calibration.time_write(state, followed(out).parent)
    tracker.advance(1)
    return Speeds(
        block=block, image=image, merge=merge, reward=scored + write, score=score,
        sde=(sde[0] + sde[1] * config.batch) / (block + image * config.batch),
        request=REQUEST_SECONDS, byte=1 / NETWORK_BYTES, start=costed.start_seconds,
        spread=images.spread,
    )  # fmt: skip


def _advice(config: OptimizeConfig, workload: Workload, devices: Sequence[int]) -> list[str]:
    """Numbers of devices that the batch leaves idle, and the batch that would not; a faster way."""
    notes = fast_hint(config.sampler or SamplerConfig(), config.device)
    for stage in workload.stages:
        if stage.name != "candidates":
            continue
        for count in devices:
            size = filling_batch(stage.items, stage.images, count, config.batch)
            if size is None:
                made = stage.items * stage.images
                notes.append(f"a round has {made} images: too few for {count} devices")
            elif size < block_size(stage.images, config.batch):
                notes.append(f"--batch {size} keeps {count} devices busy in every round")
    return notes
