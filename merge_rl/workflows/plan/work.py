"""How long the stages of a search take on some devices, and the batch that keeps them busy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merge_rl.parallel.blocks import block_size, share_blocks, split_blocks
from merge_rl.workflows.optimize import SDE, Workload, WorkStage


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Seconds that parts of the work take, as measured on one device.

    A block of b images takes block + image b; under the SDE `sde` times that.
    """

    block: float
    image: float
    sde: float
    merge: float  # of one candidate
    request: float  # to hand out work and take up what was made, beside the bytes
    byte: float  # of features, from one device to rank 0
    reward: float  # of a round: distances, search, resume point
    score: float  # of a set of images in the comparison
    start: float
    spread: float = 0.0  # (most - least) / median of repeats of the measurement of images


@dataclass(frozen=True)
class StageTime:
    """Seconds of a stage (all times) on some devices, by what they go to."""

    stage: WorkStage
    making: float  # the device with most to do
    merging: float
    gathering: float

    @property
    def total(self) -> float:
        """All together."""
        return self.making + self.merging + self.gathering


def stage_time(
    stage: WorkStage, devices: int, batch: int, speeds: Speeds, feature_bytes: int
) -> StageTime:
    """How long a stage takes; it ends when the device with most to do has sent what it made."""
    blocks = split_blocks([stage.images] * stage.items, batch)
    factor = speeds.sde if stage.sampler == SDE else 1.0
    longest, merging, sent = 0.0, 0.0, 0
    for rank, share in enumerate(share_blocks(blocks, devices)):
        images = sum(blocks[i].size for i in share)
        making = factor * (speeds.block * len(share) + speeds.image * images)
        merges = speeds.merge * len({blocks[i].item for i in share})
        if making + merges > longest + merging:
            longest, merging = making, merges
        sent += images if rank else 0
    gathering = (speeds.request if devices > 1 else 0.0) + speeds.byte * sent * feature_bytes
    return StageTime(stage, stage.times * longest, stage.times * merging, stage.times * gathering)


@dataclass(frozen=True)
class Estimate:
    """Seconds of a search on a number of devices."""

    devices: int
    stages: tuple[StageTime, ...]
    serial: float  # on rank 0 alone: rewards, resume points, scores, start
    alone: float  # the same search on one device

    @property
    def seconds(self) -> float:
        """From start to end."""
        return self.serial + sum(stage.total for stage in self.stages)

    @property
    def efficiency(self) -> float:
        """Seconds on one device / (devices x seconds here)."""
        return self.alone / (self.devices * self.seconds)

    @property
    def limit(self) -> str:
        """What costs most beside the evenly shared work."""
        uneven = sum(s.making for s in self.stages) - self._shared
        parts = {
            "blocks that do not fill the devices": uneven,
            "rewards, scores and files on rank 0": self.serial,
            "gathering features": sum(s.gathering for s in self.stages),
            "merging on every device": sum(s.merging for s in self.stages),
        }
        return max(parts, key=lambda name: parts[name])

    @property
    def _shared(self) -> float:
        made = self.alone - self.serial - sum(s.merging for s in self.stages)
        return max(0.0, made) / self.devices


def estimate(
    workload: Workload, devices: Sequence[int], batch: int, speeds: Speeds, feature_bytes: int
) -> list[Estimate]:
    """Estimates for each number of devices, all like the one that was measured."""
    serial = speeds.start + workload.rounds * speeds.reward + workload.scorings * speeds.score

    def on(count: int) -> tuple[StageTime, ...]:
        return tuple(
            stage_time(stage, count, batch, speeds, feature_bytes) for stage in workload.stages
        )

    alone = serial + sum(stage.total for stage in on(1))
    return [Estimate(count, on(count), serial, alone) for count in devices]


def filling_batch(items: int, images: int, devices: int, batch: int) -> int | None:
    """The largest batch <= `batch` whose blocks can keep all devices busy; None if none can."""
    if items * images < devices:
        return None
    for size in range(min(batch, images), 0, -1):
        shares = share_blocks(split_blocks([images] * items, size), devices)
        if all(len(share) for share in shares):
            return block_size(images, size)
    return None
