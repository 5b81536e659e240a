"""Which searcher finds the best merge of the digits runs, at equal numbers of generated images?

    python -m benchmarks.sample_efficiency [--sets sit,edm2] [--budget 90000] [--seeds 0,1,2]
                                           [--folder build/bench/searchers] [--out FILE.json]
    python -m benchmarks.sample_efficiency --searchers pathwise --ours pathwise --budget 20000
    python -m benchmarks.sample_efficiency --sets edm2-raw,edm2-few,sit-few,edm2-beyond \
                                           --budget 20000   # where merging should pay most

Every searcher starts from the same checkpoints and is given the same number of images, everything
included. All results are scored on the same fresh seeds, which nothing was chosen by, against
held-out digits. The folder is kept: what is done is not done again.

sit, edm2             raw snapshots without EMA; few steps an image (nfe 8, 7), so that the many
                      searches fit into an hour of one core
edm2-raw, sit-raw     raw snapshots with the steps that the run itself names
edm2-few, sit-few     raw snapshots with 6 and 4 network calls an image
edm2-beyond           two snapshots and few steps: the best merge lies beyond the newer one, with a
                      negative coefficient for the older
edm2-ema, sit-ema     the run's own moving averages, and the steps of edm2 and sit

Goals, medians over the seeds: the policy gradient's held-out FID is at most 0.95 of the best free
merge's and at most every black-box searcher's, and it reaches the best black-box searcher's final
value with at most half of the images; less than 2 % of the time goes to anything but sampling and
features.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from merge_rl.config.optimize import EvaluationConfig, MergeConfig, OptimizeConfig, RewardConfig
from merge_rl.config.sampler import SamplerConfig
from merge_rl.demo import write_demo
from merge_rl.workflows.compare.run import compare_searchers

OURS = "policy-gradient"
BLACK_BOXES = ("nevergrad:TBPSA", "nevergrad:CMA", "nevergrad:NGOpt", "lcsc", "lr-cma")
FREE = ("greedy-soup", "best-checkpoint", "uniform")


@dataclass(frozen=True)
class Case:
    """Checkpoints and how they are sampled."""

    run: str
    sampler: SamplerConfig | None = None  # None: what the run names
    select: tuple[str, ...] = ()
    merge: MergeConfig = field(default_factory=MergeConfig)
    track: str | None = "raw"


HEUN_4 = SamplerConfig(solver="heun", num_steps=4)
EULER_6 = SamplerConfig(solver="euler", num_steps=6)  # 3 steps of Heun make no digits
MIDPOINT = {steps: SamplerConfig(solver="midpoint", num_steps=steps) for steps in (2, 4)}
EMA = tuple(
    f"digits-{kimg:07d}-{width}"
    for kimg in (262, 524, 786, 1048, 1310, 1572, 1835, 2097)
    for width in ("0.050", "0.100")
)
CASES = {
    "sit": Case("sit", MIDPOINT[4]),
    "edm2": Case("edm2", HEUN_4),
    "sit-raw": Case("sit"),
    "edm2-raw": Case("edm2"),
    "sit-few": Case("sit", MIDPOINT[2]),
    "edm2-few": Case("edm2", EULER_6),
    "edm2-beyond": Case(
        "edm2", HEUN_4, ("digits-0001048", "digits-0001835"), MergeConfig(scale=0.05, max_abs=5)
    ),
    "sit-ema": Case("sit", MIDPOINT[4], track="ema"),
    "edm2-ema": Case("edm2", HEUN_4, EMA, track=None),
}
RATIO, HALF, OVERHEAD = 0.95, 0.5, 0.02


def settings(folder: Path, name: str, budget: int) -> OptimizeConfig:
    """What all searches of a set share."""
    case = CASES[name]
    return OptimizeConfig(
        checkpoints=str(folder / case.run),
        track=case.track,
        select=case.select,
        budget=budget,
        sampler=case.sampler,
        merge=case.merge,
        reward=RewardConfig(pool_size=1000),
        evaluation=EvaluationConfig(num_images=2000, repeats=4, selection_images=500),
    )


def verdicts(document: Mapping[str, Any], ours: str = OURS) -> dict[str, Any]:
    """The goals of searcher `ours` against what was measured, from the medians over seeds."""
    lines = {line["searcher"]: line for line in document["searchers"]}
    held = {label: line["fid"]["heldout"]["median"] for label, line in lines.items()}
    fixed = {name: entry["fid"]["heldout"]["mean"] for name, entry in document["fixed"].items()}
    free = {**fixed, **{name: held[name] for name in FREE if name in held}}
    best_free = min(free, key=lambda n: free[n])
    found = {
        "ours": held[ours],
        "best_free": [best_free, free[best_free]],
        "ratio_to_best_free": held[ours] / free[best_free],
        "overhead": lines[ours]["overhead"],
    }
    boxes = {name: held[name] for name in BLACK_BOXES if name in held}
    if not boxes:
        return found
    best_box = min(boxes, key=lambda n: boxes[n])
    # Along the way all are scored on fewer images: their ends compare with each other alone.
    level = lines[best_box]["curve"][-1]["heldout"]["median"]
    reached = [p["images"] for p in lines[ours]["curve"] if p["heldout"]["median"] <= level]
    return found | {
        "best_black_box": [best_box, boxes[best_box]],
        "ratio_to_best_black_box": held[ours] / boxes[best_box],
        "images_to_reach_it": min(reached, default=None),
    }


def judge(name: str, found: Mapping[str, Any], budget: int) -> None:
    """Print the goals."""
    rows = [
        (f"held-out FID / {found['best_free'][0]}'s", found["ratio_to_best_free"], RATIO),
        ("time beside sampling and features", found["overhead"], OVERHEAD),
    ]
    if "best_black_box" in found:
        reached, box = found["images_to_reach_it"], found["best_black_box"][0]
        rows += [
            (f"held-out FID / {box}'s", found["ratio_to_best_black_box"], 1.0),
            ("share of the images to reach it", reached and reached / budget, HALF),
        ]
    for text, value, goal in rows:
        shown = "not reached" if value is None else f"{value:.3f}"
        verdict = "reached" if value is not None and value <= goal else "missed"
        print(f"  {name}: {text}: {shown}; goal <= {goal}: {verdict}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Searchers at equal numbers of images.")
    parser.add_argument("--sets", default="sit,edm2")
    parser.add_argument("--budget", type=int, default=90_000)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--curve-images", type=int, help="0: ends alone are scored")
    parser.add_argument("--ours", default=OURS, help="whose goals are judged")
    parser.add_argument("--searchers", default=",".join((OURS, *BLACK_BOXES, *FREE)))
    parser.add_argument("--folder", type=Path, default=Path("build/bench/searchers"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    seeds = [int(text) for text in given.seeds.split(",")]
    if not (given.folder / "digits").exists():
        write_demo(given.folder / "digits")
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "budget": given.budget}
    for name in given.sets.split(","):
        document = compare_searchers(
            settings(given.folder / "digits", name, given.budget),
            out=given.folder / name, searchers=given.searchers.split(","), seeds=seeds,
            curve_images=given.curve_images,
        )  # fmt: skip
        print(json.dumps(document["searchers"], indent=1))
        found[name] = {"verdicts": verdicts(document, given.ours), "comparison": document}
        judge(name, found[name]["verdicts"], given.budget)
    if given.out:
        given.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
