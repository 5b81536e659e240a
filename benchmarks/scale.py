"""Two processes against one, and what a round costs beside its images.

    python -m benchmarks.scale [--ranks 2] [--repeats 5] [--out FILE.json]

Starts itself under torchrun, one thread a process, on the embedded run of digits. In turns rank 0
makes a round's images alone (16 candidates of 100), the others asleep, and all make them together.
Goal: two processes on two cores make at least 1.7 times the images a second.

Then a round of P = 128 candidates of n = 50 images with d = 2,048 features, made of nothing: the
request, the gathering over loopback, ask and tell. Goal: under 50 ms. Beside it what no round can
do without: the features of the others sent in one piece, into memory that is in use already.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from merge_rl.config.optimize import OptimizeConfig, SearchConfig
from merge_rl.core.sampling.compatibility import balanced_labels
from merge_rl.demo import write_demo
from merge_rl.parallel import joined
from merge_rl.parallel.group import Group
from merge_rl.storage.checkpoints.checkpoint_set import open_checkpoints
from merge_rl.workflows.assembly.job import build_job
from merge_rl.workflows.assembly.resolve import resolve_config
from merge_rl.workflows.optimize.search import make_searcher
from merge_rl.workflows.rollout.distributed import DistributedRollout
from merge_rl.workflows.rollout.rollout import MergedRollout, Rollout, WorkItem

POPULATION, IMAGES = 16, 100
SPEEDUP, OVERHEAD = 1.7, 0.050
WIDE, MANY, FEW = 2048, 128, 50


class Nothing(Rollout):
    """Features that cost nothing, as wide as those of Inception."""

    def noise(self, seeds: Any) -> torch.Tensor:
        return torch.zeros(len(seeds), 1)

    def features_of(self, blocks: Any) -> Any:
        for block in blocks:
            yield torch.zeros(len(block()[1]), WIDE)


def items(coefficients: torch.Tensor, population: int, images: int) -> list[WorkItem]:
    seeds, labels = list(range(images)), balanced_labels(images, 10)
    return [WorkItem(coefficients, seeds, labels) for _ in range(population)]


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def transfers(group: Group, repeats: int) -> list[float]:
    """Seconds that the features of a round take to rank 0 from the others; all must call it."""
    share = torch.zeros(MANY * FEW // group.size, WIDE)
    into = [torch.zeros_like(share) for _ in range(group.size)] if group.leads else []

    def move() -> None:
        if group.leads:
            moving = [group.receive(into[rank], rank, 0) for rank in range(1, group.size)]
        else:
            moving = [group.send(share, 0)]
        group.settle(moving, phase="transfer")

    return [seconds(move) for _ in range(repeats + 1)][1:]


def empty_rollout(like: Rollout) -> MergedRollout:
    made = Nothing(
        like.model, (1, 1, 1), sampler=like.sampler, autoencoder=like.autoencoder,
        extractor=like.extractor, batch=FEW,
    )  # fmt: skip
    made.extractor = type("Wide", (), {"name": "wide", "dim": WIDE})()
    return MergedRollout(None, made, name="empty")


def work(group: Group, folder: Path, repeats: int) -> dict[str, Any] | None:
    torch.set_num_threads(1)
    opened = open_checkpoints(folder / "edm2", track="raw")
    search = SearchConfig(name="policy-gradient", population=MANY)
    config = OptimizeConfig(checkpoints=str(folder), search=search)
    config = resolve_config(config, opened)
    job = build_job(config, opened)
    empty = empty_rollout(job.rollout.rollout)
    ranks = DistributedRollout(group, (job.rollout, empty))
    floor = transfers(group, 2 * repeats)
    if not group.leads:
        ranks.follow()
        return None
    coefficients = job.coefficients(None)
    made = items(coefficients, POPULATION, IMAGES)
    together, spread = job.rollout, job.rollout.spread
    alone = MergedRollout(together.live, together.rollout)
    rows = []
    for _ in range(repeats + 1):
        rows.append((seconds(lambda: alone.features_of(made)),
                     seconds(lambda: together.features_of(made, "round"))))  # fmt: skip
    rows = rows[1:]  # the first sets things up
    assert spread is not None
    searcher = make_searcher(config, job)
    wide = items(coefficients, MANY, FEW)

    def round_of_nothing() -> None:
        thetas = searcher.ask()
        empty.features_of(wide, "round")
        searcher.tell(thetas, torch.arange(len(thetas)).double())

    round_of_nothing()
    overheads = [seconds(round_of_nothing) for _ in range(2 * repeats)]
    ranks.end()
    images = POPULATION * IMAGES
    return {
        "ranks": group.size, "repeats": repeats, "images": images,
        "alone": [images / a for a, _ in rows], "together": [images / b for _, b in rows],
        "speedup": statistics.median(a / b for a, b in rows), "overhead": overheads,
        "transfer": floor, "load": os.getloadavg()[0],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Several processes against one.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder is None:
        with tempfile.TemporaryDirectory() as name:
            write_demo(Path(name))
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                        f"--nproc-per-node={given.ranks}", "-m", "benchmarks.scale"]  # fmt: skip
            launcher += ["--folder", name, "--repeats", str(given.repeats)]
            launcher += ["--out", str(given.out)] if given.out else []
            subprocess.run(launcher, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return
    with joined() as group:
        row = work(group, given.folder, given.repeats)
    if row is None:
        return
    for name in ("alone", "together"):
        rates = row[name]
        print(f"{name:>9}: {statistics.median(rates):7.1f} images/s "
              f"[{min(rates):.1f}, {max(rates):.1f}]")  # fmt: skip
    verdict = "reached" if row["speedup"] >= SPEEDUP else "missed"
    print(f"{row['ranks']} processes: {row['speedup']:.2f} x, median of {row['repeats']}; goal "
          f"{SPEEDUP}: {verdict} (load average {row['load']:.1f})")  # fmt: skip
    overhead = statistics.median(row["overhead"])
    verdict = "reached" if overhead < OVERHEAD else "missed"
    print(f"a round beside its images, P = {MANY}, n = {FEW}, d = {WIDE}: {1e3 * overhead:.1f} ms, "
          f"median of {len(row['overhead'])}; goal {1e3 * OVERHEAD:.0f} ms: {verdict}")  # fmt: skip
    print(f"of which the bytes alone: {1e3 * statistics.median(row['transfer']):.1f} ms")
    if given.out:
        given.out.write_text(json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    main()
