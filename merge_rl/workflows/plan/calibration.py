"""How fast this machine is at the parts of a search: a few seconds of each, on weights at random.

Time does not depend on the values of weights, so nothing is read but settings and statistics.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from merge_rl.core.distances.statistics import FeatureStats
from merge_rl.core.merging.weighted_sum import weighted_sum
from merge_rl.core.sampling.compatibility import balanced_labels
from merge_rl.parallel.blocks import block_size
from merge_rl.storage.files import save_tensors
from merge_rl.workflows.evaluate import Scorer
from merge_rl.workflows.rewards import Pool, RewardSum
from merge_rl.workflows.rollout import Rollout

ENOUGH: Final = 0.4  # seconds of one measurement, where it can be made longer
SLICE: Final = 1 << 24  # elements of a checkpoint that a merge is measured on, at most
WRITTEN: Final = 1 << 26  # bytes that writing is measured with, at most
CALLS: Final = (2, 5)  # solver steps between which a network call is taken


@dataclasses.dataclass(frozen=True)
class ImageTime:
    """Seconds of a block of b images: (block_call + image_call b) calls + block + image b."""

    block_call: float
    image_call: float
    block: float
    image: float

    def of(self, calls: int) -> tuple[float, float]:
        """(a, c) of a + c b for a sampler that calls the network so often."""
        return self.block_call * calls + self.block, self.image_call * calls + self.image


def time_images(rollout: Rollout, num_classes: int, images: int) -> ImageTime:
    """Times of a rollout's blocks, from items of up to `images` images and half as many.

    As a search makes them: blocks side by side where there are threads for it. Fewer images stand
    for as many as take a measurable time.
    """
    short, long = (_with_steps(rollout, steps) for steps in CALLS)
    count = rollout.workers
    _seconds_of(short, count, num_classes)  # the first call sets things up
    while count < images and _seconds_of(long, count, num_classes) < ENOUGH:
        count = min(2 * count, images)
    small = max(1, count // 2)
    steps = CALLS[1] - CALLS[0]
    found = {n: [_median(r, n, num_classes) for r in (short, long)] for n in (small, count)}
    calls = {n: max(0.0, (b - a) / steps) for n, (a, b) in found.items()}
    rest = {n: max(0.0, found[n][0] - CALLS[0] * calls[n]) for n in found}
    blocks = {n: len(range(0, n, block_size(n, rollout.batch))) for n in found}
    block_call, image_call = _line(calls, blocks)
    block, image = _line(rest, blocks)
    return ImageTime(block_call, image_call, block, image)


def _line(seconds: dict[int, float], blocks: dict[int, int]) -> tuple[float, float]:
    """(a, c) of seconds = a blocks + c images through two points, neither below 0."""
    (n, m), (s, t) = sorted(seconds), [seconds[k] for k in sorted(seconds)]
    det = blocks[n] * m - blocks[m] * n
    if n == m or det == 0:
        return 0.0, t / m
    a = (s * m - t * n) / det
    c = (t - a * blocks[m]) / m
    if a < 0 or c < 0:
        return (0.0, t / m) if a < 0 else (t / blocks[m], 0.0)
    return a, c


def _with_steps(rollout: Rollout, steps: int) -> Rollout:
    sampler = dataclasses.replace(rollout.sampler, solver="euler", num_steps=steps)
    return rollout.with_sampler(sampler)


def _median(rollout: Rollout, count: int, num_classes: int) -> float:
    return statistics.median(_seconds_of(rollout, count, num_classes) for _ in range(3))


def _seconds_of(rollout: Rollout, count: int, num_classes: int) -> float:
    labels = balanced_labels(count, num_classes)
    return _seconds(lambda: rollout.features(rollout.noise(range(count)), labels))


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def time_merge(checkpoints: int, size: int, dtype: torch.dtype, device: str) -> float:
    """Seconds of one merge of checkpoints of `size` elements that lie on the device."""
    count = min(size, SLICE)
    rows = list(torch.randn(checkpoints, count).to(device, dtype))
    out = torch.empty(count, device=device)
    coefficients = torch.full((checkpoints,), 1 / checkpoints)

    def merge() -> None:
        weighted_sum(rows, coefficients, out)
        out[:1].cpu()  # waits for the device

    merge()
    return statistics.median(_seconds(merge) for _ in range(3)) * size / count


def time_reward(
    reward: RewardSum,
    like: FeatureStats,
    pool_size: int,
    draws: int,
    subset: int,
    population: int,
    *,
    pooled: bool = True,
) -> float:
    """Seconds of a round's rewards: scores of all candidates, and two distances of the pool.

    Features are drawn about the mean of `like`; a straight line through one and three candidates
    stands for all.
    """
    rows = [torch.arange(subset) for _ in range(draws)]

    def once(candidates: int) -> float:
        made = [(r, torch.stack([_features(like, subset)] * candidates)) for r in rows]
        if not pooled:
            return _seconds(lambda: reward.scores(None, made))
        pool = Pool.of(_features(like, pool_size), torch.zeros(pool_size, dtype=torch.int64))
        changed = pool.replaced(rows[0], made[0][1][0])

        def work() -> None:
            reward.pool_distance(pool)
            reward.scores(pool, made)
            reward.pool_distance(changed)

        return _seconds(work)

    once(3)  # the first call sets things up
    one, three = once(1), once(3)
    each = max(0.0, (three - one) / 2)
    return one + each * (population - 1)


def time_score(scorer: Scorer, like: FeatureStats, count: int) -> float:
    """Seconds to score a set of images whose features are known."""
    features = _features(like, count)
    scorer.score(features)
    return _seconds(lambda: scorer.score(features))


def _features(like: FeatureStats, count: int) -> Tensor:
    scale = like.cov.diagonal().clamp(min=0).sqrt().float()
    noise = torch.randn(count, like.dim, generator=torch.Generator().manual_seed(0))
    return like.mean.float() + scale * noise


def time_write(size: int, folder: Path) -> float:
    """Seconds to write a resume point of `size` bytes to the file system of a folder."""
    while not folder.is_dir():
        folder = folder.parent
    count = min(size, WRITTEN)
    tensors = {"x": torch.zeros(max(1, count // 4))}
    with tempfile.TemporaryDirectory(prefix=".mergerl-plan-", dir=folder) as place:
        path = Path(place) / "x.safetensors"
        seconds = statistics.median(_seconds(lambda: save_tensors(path, tensors)) for _ in range(3))
    return seconds * size / max(count, 1)
