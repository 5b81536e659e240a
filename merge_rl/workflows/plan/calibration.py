"""How fast this machine is at the parts of a search: a few seconds of each, on weights at random.

Time does not depend on the values of weights, so nothing is read but settings and statistics.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from merge_rl.core.distances.statistics import FeatureStats
from merge_rl.core.merging.buffers import weighted_sum
from merge_rl.parallel.blocks import block_size
from merge_rl.storage.files import save_tensors
from merge_rl.workflows.evaluate import Scorer
from merge_rl.workflows.rewards import Pool, RewardSum
from merge_rl.workflows.rollout import Rollout, Timing, is_long, make_images, stepped
from merge_rl.workflows.rollout import timings as timed

ENOUGH: Final = 0.4  # seconds of one measurement at least
PLENTY: Final = 1.0  # seconds after which a smaller item stands for a whole one
REPEATS: Final = 5
LONGEST: Final = 30.0  # seconds after which nothing more is repeated
SLICE: Final = 1 << 24  # elements of a checkpoint that a merge is measured on, at most
WRITTEN: Final = 1 << 26  # bytes that writing is measured with, at most
CALLS: Final = (2, 10)  # solver steps between which a network call is taken


def timings(works: Sequence[Callable[[], object]]) -> list[Timing]:
    """The time of each, as calibration measures it."""
    return timed(works, enough=ENOUGH, repeats=REPEATS, longest=LONGEST)


@dataclasses.dataclass(frozen=True)
class ImageTime:
    """Seconds of a block of b images: (block_call + image_call b) calls + block + image b."""

    block_call: float
    image_call: float
    block: float
    image: float
    spread: float = 0.0  # the widest of the measurements behind them

    def of(self, calls: int) -> tuple[float, float]:
        """(a, c) of a + c b for a sampler that calls the network so often."""
        return self.block_call * calls + self.block, self.image_call * calls + self.image


def time_images(rollout: Rollout, num_classes: int, images: int) -> ImageTime:
    """Times of a rollout's blocks, from items of `images` images and half as many.

    As a search makes them: blocks side by side where there are threads for it. Where that takes
    long, fewer images stand for them: what a block takes at all is little then.
    """
    short, long = (stepped(rollout, steps) for steps in CALLS)
    count = rollout.workers
    make_images(short, count, num_classes)  # the first call sets things up
    while count < images and not (count > 1 and is_long(_maker(long, count, num_classes), PLENTY)):
        count = min(2 * count, images)
    counts = dict.fromkeys((max(1, count // 2), count))
    makers = [_maker(r, n, num_classes) for n in counts for r in (short, long)]
    found = timings(makers)
    pairs = {n: found[2 * i : 2 * i + 2] for i, n in enumerate(counts)}
    steps = CALLS[1] - CALLS[0]
    calls = {n: max(0.0, (b.seconds - a.seconds) / steps) for n, (a, b) in pairs.items()}
    rest = {n: max(0.0, a.seconds - CALLS[0] * calls[n]) for n, (a, _) in pairs.items()}
    blocks = {n: len(range(0, n, block_size(n, rollout.batch))) for n in counts}
    spread = max(timing.spread for timing in found)
    return ImageTime(*_line(calls, blocks), *_line(rest, blocks), spread)


def _line(seconds: dict[int, float], blocks: dict[int, int]) -> tuple[float, float]:
    """(a, c) of seconds = a blocks + c images through two points, neither below 0."""
    n, m = min(seconds), max(seconds)
    s, t = seconds[n], seconds[m]
    det = blocks[n] * m - blocks[m] * n
    if n == m or det == 0:
        return 0.0, t / m
    a = (s * m - t * n) / det
    c = (t - a * blocks[m]) / m
    if a < 0 or c < 0:
        return (0.0, t / m) if a < 0 else (t / blocks[m], 0.0)
    return a, c


def _maker(rollout: Rollout, count: int, num_classes: int) -> Callable[[], object]:
    return partial(make_images, rollout, count, num_classes)


def time_merge(checkpoints: int, size: int, dtype: torch.dtype, device: str) -> float:
    """Seconds of one merge of checkpoints of `size` elements that lie on the device."""
    count = min(size, SLICE)
    rows = list(torch.randn(checkpoints, count).to(device, dtype))
    out = torch.empty(count, device=device)
    coefficients = torch.full((checkpoints,), 1 / checkpoints)

    def merge() -> None:
        weighted_sum(rows, coefficients, out)
        out[:1].cpu()  # waits for the device

    return timings([merge])[0].seconds * size / count


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

    def work(candidates: int) -> Callable[[], object]:
        made = [(r, torch.stack([_features(like, subset)] * candidates)) for r in rows]
        if not pooled:
            return lambda: reward.scores(None, made)
        pool = Pool.of(_features(like, pool_size), torch.zeros(pool_size, dtype=torch.int64))
        changed = pool.replaced(rows[0], made[0][1][0])

        def pooled_round() -> None:
            reward.pool_distance(pool)
            reward.scores(pool, made)
            reward.pool_distance(changed)

        return pooled_round

    one, three = (timing.seconds for timing in timings([work(1), work(3)]))
    each = max(0.0, (three - one) / 2)
    return one + each * (population - 1)


def time_score(scorer: Scorer, like: FeatureStats, count: int) -> float:
    """Seconds to score a set of images whose features are known."""
    return timings([partial(scorer.score, _features(like, count))])[0].seconds


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
        timing = timings([partial(save_tensors, path, tensors)])[0]
    return timing.seconds * size / max(count, 1)
