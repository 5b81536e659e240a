"""How good is the search on the embedded digits run, from the last raw snapshot?

    python benchmarks/digits_search.py [--budget 90000] [--seeds 0,1,2] [--out FILE.json]

Each seed is a whole `optimize` run that ends with the comparison of start, uniform average, best
single checkpoint and result on fresh seeds that no choice was made by. Goal: the result's held-out
FID is at most 0.92 of the uniform average's, median of three seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from merge_rl.config.mapping import load_config
from merge_rl.config.optimize import EvaluationConfig, OptimizeConfig
from merge_rl.demo import write_demo
from merge_rl.workflows.evaluate.final_scores import ENTRIES
from merge_rl.workflows.optimize.run import optimize

GOAL = 0.92


def run(folder: Path, budget: int, seed: int, settings: OptimizeConfig) -> dict[str, Any]:
    """One search; a row of the table."""
    began = time.monotonic()
    result = optimize(
        folder / "edm2", out=folder / f"run-{seed}", budget=budget, seed=seed, config=settings
    )
    entries = result.comparison.as_dict()["entries"]
    held = {entry: entries[entry]["heldout"] for entry in ENTRIES}
    return {
        "seed": seed,
        "search_images": result.images,
        "seconds": time.monotonic() - began,
        "heldout": {entry: value["mean"] for entry, value in held.items()},
        "interval": {entry: [value["low"], value["high"]] for entry, value in held.items()},
        "ratio": held["result"]["mean"] / held["uniform"]["mean"],
        "separate_from_start": held["result"]["high"] < held["start"]["low"],
        "separate_from_best_single": held["result"]["high"] < held["best single"]["low"],
        "coefficients": result.coefficients.tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Search quality on the embedded digits run.")
    parser.add_argument("--budget", type=int, default=90_000)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--config", type=Path, default=Path("digits"))
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    seeds = [int(text) for text in arguments.seeds.split(",")]
    final = EvaluationConfig(num_images=arguments.num_images, repeats=arguments.repeats)
    settings = load_config(OptimizeConfig, arguments.config)
    settings = OptimizeConfig(**{**vars(settings), "evaluation": final})
    with tempfile.TemporaryDirectory() as folder:
        write_demo(Path(folder))
        rows = []
        print(f"held-out FID, N = {final.num_images}, mean of {final.repeats} repeats")
        print(f"{'seed':>6} {'images':>8} {'s':>6}", *(f"{e:>12}" for e in ENTRIES), "   ratio")
        for seed in seeds:
            row = run(Path(folder), arguments.budget, seed, settings)
            rows.append(row)
            scores = (f"{row['heldout'][entry]:12.3f}" for entry in ENTRIES)
            images, seconds = row["search_images"], row["seconds"]
            print(f"{seed:>6} {images:>8} {seconds:6.0f}", *scores, f"{row['ratio']:8.3f}")
    ratio = statistics.median(row["ratio"] for row in rows)
    verdict = "reached" if ratio <= GOAL else "missed"
    print(f"median of result / uniform: {ratio:.3f}; goal {GOAL}: {verdict}")
    if arguments.out:
        document = {
            "budget": arguments.budget,
            "num_images": final.num_images,
            "repeats": final.repeats,
            "threads": torch.get_num_threads(),
            "median_ratio": ratio,
            "goal": GOAL,
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
