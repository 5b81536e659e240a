"""Memory that a search needs on one device, and the largest batch that a device has room for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from merge_rl.config import AUTO_BATCH, OptimizeConfig
from merge_rl.errors import OutOfMemoryError
from merge_rl.storage.checkpoints import CheckpointSet
from merge_rl.workflows.assembly.costs import Cost, PartCosts, cost_parts, weight_bytes
from merge_rl.workflows.rollout import choose_place, free_memory, free_on

STATES: Final = 6  # of the samples that a solver holds at once
SQUARES: Final = 6  # float64 matrices (D, D) that a distance works with
LARGEST: Final = 4096  # images that are looked at for the largest batch
SHARE: Final = 0.8  # of what is free that a batch chosen by memory may need
MOST, MOST_ON_CPU = 1024, 250  # beyond which a batch gains nothing


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device: what lies there throughout, and what a batch adds."""

    weights: Mapping[str, int]
    sampling: Cost
    finishing: Cost  # decoding and extraction, whichever needs more
    sample_bytes: int  # of one sample in a solver
    side_by_side: int  # batches under way at the same time
    overlapped: bool  # whether finishing runs beside sampling
    capacity: int
    device: str
    place: str  # of the checkpoints

    def needed(self, batch: int) -> int:
        """Bytes with a batch of that many images."""
        return sum(self.weights.values()) + self.activations(batch)

    def activations(self, batch: int) -> int:
        """Bytes of what a batch holds at its peak."""
        sampling = self.sampling.peak(batch) + STATES * self.sample_bytes * batch
        finishing = self.finishing.peak(batch)
        peak = sampling + finishing if self.overlapped else max(sampling, finishing)
        return self.side_by_side * peak

    @property
    def largest_batch(self) -> int:
        """The largest batch, up to `LARGEST`, that fits; 0 if none does."""
        low, high = 0, LARGEST
        while low < high:
            middle = math.ceil((low + high) / 2)
            if self.needed(middle) <= self.capacity:
                low = middle
            else:
                high = middle - 1
        return low

    def require_fit(self, batch: int) -> None:
        """Raise OutOfMemoryError unless a batch fits."""
        if self.needed(batch) <= self.capacity:
            return
        has = f"{self.device} has {gib(self.capacity)}"
        best = self.largest_batch
        if best == 0:
            raise OutOfMemoryError(
                f"not even one image at a time fits: {gib(self.needed(1))} are needed, {has}"
                + ("; --weights-device cpu or disk takes the checkpoints off it"
                   if self.weights.get("checkpoints") and self.device != "cpu" else "")
            )  # fmt: skip
        raise OutOfMemoryError(
            f"a batch of {batch} needs {gib(self.needed(batch))}, {has}; the largest batch that "
            f"fits is {best}"
        )

    def as_dict(self, batch: int) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "device": self.device, "needed": self.needed(batch), "capacity": self.capacity,
            "weights": dict(self.weights), "activations": self.activations(batch),
            "checkpoints lie": self.place, "largest_batch": self.largest_batch,
        }  # fmt: skip


def plan_memory(
    config: OptimizeConfig, checkpoints: CheckpointSet, costed: PartCosts, memory: int | None = None
) -> MemoryPlan:
    """Memory of a search on its device, which has `memory` bytes or what is free here."""
    device, kind = config.device, torch.device(config.device).type
    capacity = _free_for(device) if memory is None else memory
    place = choose_place(
        checkpoints.total_bytes, device, free_device=capacity if kind == "cuda" else None,
        free_memory=capacity if kind == "cpu" else free_memory(), given=config.weights_device,
    )  # fmt: skip
    dim, rollout = costed.dim, costed.rollout
    weights = {
        "checkpoints": checkpoints.total_bytes if place == device else 0,
        "merged weights": 4 * costed.size,
        "guide": weight_bytes(rollout.guide),
        "decoder": weight_bytes(rollout.autoencoder),
        "extractor": weight_bytes(rollout.extractor),
        "rewards": SQUARES * 8 * dim * dim,
    }
    none = Cost(0.0, 0, 0.0)
    network = costed.costs["network"]
    if config.guided and not rollout.guide and not rollout.sampler.low_memory:
        network = Cost(network.flops, network.fixed, 2 * network.per_image)
    return MemoryPlan(
        weights={name: size for name, size in weights.items() if size},
        sampling=network,
        finishing=max(
            (costed.costs.get(name, none) for name in ("decoder", "extractor")),
            key=lambda cost: cost.peak(config.batch),
        ),
        sample_bytes=4 * math.prod(rollout.shape),
        side_by_side=rollout.workers,
        overlapped=kind == "cuda",
        capacity=capacity,
        device=device,
        place=place,
    )


def _free_for(device: str) -> int:
    """Bytes free on a device, or in memory where a device does not tell."""
    found = free_on(device)
    return free_memory() if found is None else found


def gib(size: int) -> str:
    """Bytes as text."""
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.3g} MiB"


def fit_batch(
    config: OptimizeConfig,
    checkpoints: CheckpointSet,
    memory: int | None = None,
    announce: Callable[[str], None] = lambda _text: None,
) -> OptimizeConfig:
    """The config with a batch that its device has room for, where it leaves the batch open.

    A share of what is free is left alone: kernels need workspace, and the estimate is one. Results
    depend on the batch in their last bits, so that the number is part of the settings from here on.
    """
    if config.batch != AUTO_BATCH:
        return config
    trial = dataclasses.replace(config, batch=1)
    free = _free_for(config.device) if memory is None else memory
    costed = cost_parts(trial, checkpoints, announce)
    found = plan_memory(trial, checkpoints, costed, round(SHARE * free))
    found.require_fit(1)
    most = MOST_ON_CPU if torch.device(config.device).type == "cpu" else MOST
    batch = min(found.largest_batch, most)
    announce(f"batch {batch}: of {gib(free)} free {gib(found.needed(batch))} are needed")
    return dataclasses.replace(config, batch=batch)
