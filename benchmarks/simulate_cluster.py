"""How much of 64 devices does a search use? A simulation from times measured on one.

    python -m benchmarks.simulate_cluster [--workers 64] [--population 16] [--subset 512]
        [--image-ms 35] [--merge-ms 20] [--reward-ms ...] [--measure CKPTS] [--out FILE.json]

Discrete events: rank 0 hands out a round, every worker merges and makes its blocks one after the
other, each taking a time drawn about the measured one, sends its features over one link into rank 0
(in the order in which they are ready), and rank 0 scores and takes the next step. Goal: parallel
efficiency of at least 0.95 at P = 16, n = 512 on 64 workers, and the part that limits it named.

With --measure the times are those of a checkpoint set on this machine (`mergerl plan`'s own
calibration). Without, they are the given ones; the defaults stand for no machine in particular.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import json
import random
from dataclasses import dataclass
from pathlib import Path

from merge_rl.config.optimize import OptimizeConfig
from merge_rl.parallel.blocks import share_blocks, split_blocks
from merge_rl.workflows.plan.work import filling_batch

GOAL = 0.95


@dataclass(frozen=True)
class Times:
    """Seconds, as measured on one device."""

    block: float
    image: float
    merge: float
    request: float  # for a message to reach a worker
    feature_bytes: int  # of an image
    link: float  # bytes a second into rank 0
    serial: float  # of a round on rank 0: rewards, search, resume point
    jitter: float  # standard deviation of a block's time, relative


@dataclass(frozen=True)
class Round:
    """Seconds of a simulated round, and where they went on the way that decided its length."""

    total: float
    making: float  # of the worker that was ready last
    merging: float
    waiting: float  # for the link, beside its own bytes
    sending: float
    serial: float
    work: float  # of all workers: merges once a candidate, and images


def simulate(
    workers: int, population: int, images: int, batch: int, times: Times, generator: random.Random
) -> Round:
    """One round of a search."""
    blocks = split_blocks([images] * population, batch)
    ready: list[tuple[float, int, float, float]] = []  # when, bytes, making, merging
    for rank, share in enumerate(share_blocks(blocks, workers)):
        making = sum(
            (times.block + times.image * blocks[i].size)
            * max(0.5, generator.gauss(1, times.jitter))
            for i in share
        )
        merging = times.merge * len({blocks[i].item for i in share})
        sent = sum(blocks[i].size for i in share) * times.feature_bytes if rank else 0
        heapq.heappush(ready, (times.request + making + merging, sent, making, merging))
    free, last = 0.0, (0.0, 0.0, 0.0, 0.0)
    while ready:
        when, sent, making, merging = heapq.heappop(ready)
        begin = max(when, free)
        free = begin + sent / times.link
        last = (making, merging, begin - when, sent / times.link)
    work = len(blocks) * times.block + population * (images * times.image + times.merge)
    return Round(free + times.serial, *last, times.serial, work)


def measured(folder: Path, population: int, images: int) -> Times:
    """Times of a checkpoint set on this machine."""
    from merge_rl.config.optimize import EvaluationConfig, RewardConfig, SearchConfig
    from merge_rl.storage.checkpoints.checkpoint_set import open_checkpoints
    from merge_rl.workflows.assembly.resolve import resolve_config
    from merge_rl.workflows.plan.run import plan

    opened = open_checkpoints(folder)
    config = OptimizeConfig(
        checkpoints=str(folder), budget=200_000,
        reward=RewardConfig(subset_size=images),
        search=SearchConfig(name="policy-gradient", population=population),
        evaluation=EvaluationConfig(num_images=5000),
    )  # fmt: skip
    found = plan(resolve_config(config, opened), opened)
    s = found.speeds
    return Times(
        block=s.block, image=s.image, merge=s.merge, request=s.request, link=1 / s.byte,
        feature_bytes=4 * found.feature_dim, serial=s.reward, jitter=0.03,
    )  # fmt: skip


def report(
    workers: int, population: int, images: int, batch: int, times: Times, rounds: int
) -> dict[str, float | str]:
    """Efficiency over some rounds, and what costs most beside evenly shared work."""
    generator = random.Random(0)
    made = [simulate(workers, population, images, batch, times, generator) for _ in range(rounds)]
    total = sum(r.total for r in made)
    alone = sum(r.work + r.serial for r in made)
    parts = {
        "uneven blocks and jitter": sum(r.making for r in made)
        - sum(r.work - population * times.merge for r in made) / workers,
        "merging on every worker": sum(r.merging for r in made) - rounds * population * times.merge
        / workers,
        "gathering features": sum(r.waiting + r.sending for r in made),
        "rewards and search on rank 0": sum(r.serial for r in made) * (1 - 1 / workers),
    }  # fmt: skip
    limit = max(parts, key=lambda name: parts[name])
    return {
        "workers": workers, "population": population, "images": images, "batch": batch,
        "seconds a round": total / rounds, "efficiency": alone / (workers * total),
        "limit": limit, **{name: value / total for name, value in parts.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="A search on many devices, simulated.")
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--subset", type=int, default=512)
    parser.add_argument("--batch", type=int, help="default: the largest that fills the workers")
    parser.add_argument("--image-ms", type=float, default=35.0)
    parser.add_argument("--block-ms", type=float, default=20.0)
    parser.add_argument("--merge-ms", type=float, default=20.0)
    parser.add_argument("--reward-ms", type=float, default=100.0)
    parser.add_argument("--feature-dim", type=int, default=2048)
    parser.add_argument("--link", type=float, default=1e9, help="bytes a second")
    parser.add_argument("--jitter", type=float, default=0.03)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--measure", type=Path, help="checkpoint set to take the times of")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.measure:
        times = measured(given.measure, given.population, given.subset)
        times = dataclasses.replace(times, jitter=given.jitter)
    else:
        times = Times(
            block=given.block_ms / 1e3, image=given.image_ms / 1e3, merge=given.merge_ms / 1e3,
            request=0.002, feature_bytes=4 * given.feature_dim, link=given.link,
            serial=given.reward_ms / 1e3, jitter=given.jitter,
        )  # fmt: skip
    print(f"P = {given.population}, n = {given.subset}, {given.rounds} rounds; {times}")
    print(f"{'workers':>8} {'batch':>6} {'s/round':>9} {'efficiency':>11}  limited by")
    rows = []
    for workers in sorted({1, 8, given.workers}):
        best = filling_batch(given.population, given.subset, workers, 250) or 1
        row = report(workers, given.population, given.subset, given.batch or best, times,
                     given.rounds)  # fmt: skip
        rows.append(row)
        print(f"{workers:>8} {row['batch']:>6} {row['seconds a round']:9.3f} "
              f"{row['efficiency']:11.3f}  {row['limit'] if workers > 1 else '-'}")  # fmt: skip
    verdict = "reached" if float(rows[-1]["efficiency"]) >= GOAL else "missed"
    print(f"goal {GOAL} on {given.workers} workers: {verdict}")
    if given.out:
        document = {"times": dataclasses.asdict(times), "rows": rows}
        given.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
