"""Does a search take as long as `mergerl plan` says?

    python -m benchmarks.plan_accuracy [--runs 3] [--budget 6000] [--device cuda] [--out FILE.json]

In turns a plan of the embedded digits run and the run itself, in one process; the images and the
seconds of both are compared. Goal: the estimate is within 25 % of the measured time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from merge_rl.config.optimize import EvaluationConfig, OptimizeConfig, RewardConfig
from merge_rl.demo import write_demo
from merge_rl.storage.checkpoints.checkpoint_set import open_checkpoints
from merge_rl.workflows.assembly.resolve import resolve_config
from merge_rl.workflows.optimize.run import optimize
from merge_rl.workflows.plan.run import plan

GOAL = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description="Estimates against runs.")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--budget", type=int, default=6000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    print(f"{'images':>8} {'planned s':>10} {'measured s':>11} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_demo(folder)
        config = OptimizeConfig(
            checkpoints=str(folder / "edm2"), track="raw", budget=given.budget,
            device=given.device,
            reward=RewardConfig(pool_size=1000, refresh_size=200),
            evaluation=EvaluationConfig(num_images=500, repeats=4, selection_images=200),
        )  # fmt: skip
        for index in range(given.runs):
            began = time.perf_counter()
            opened = open_checkpoints(folder / "edm2", track="raw")
            found = plan(resolve_config(config, opened), opened, out=folder / "run")
            took = time.perf_counter() - began
            planned = found.estimates[0].seconds
            began = time.perf_counter()
            result = optimize(config.checkpoints, out=folder / f"run-{index}", config=config)
            measured = time.perf_counter() - began
            images = found.workload.images
            rows.append({"images": images, "planned": planned, "measured": measured,
                         "searched": result.images, "plan_seconds": took,
                         "load": os.getloadavg()[0]})  # fmt: skip
            ratio = planned / measured
            print(f"{images:>8} {planned:10.1f} {measured:11.1f} {ratio:6.2f}", flush=True)
    off = [abs(row["planned"] / row["measured"] - 1) for row in rows]
    verdict = "reached" if max(off) <= GOAL else "missed"
    print(f"off by {statistics.median(off):.0%} (median), {max(off):.0%} (most); goal {GOAL:.0%}: "
          f"{verdict}; load average {os.getloadavg()[0]:.1f}")  # fmt: skip
    if given.out:
        given.out.write_text(
            json.dumps({"device": given.device, "rows": rows, "goal": GOAL}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
