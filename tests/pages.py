"""Folders of runs as they might lie on disk, made without any search: what pages are written of."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from merge_rl.config import CURVES, FinetuneConfig, OptimizeConfig, dump_config, to_mapping

HOSTILE = '<script>document.title="run"</script>"><img src=x onerror="document.title=1">'


def summary(mean: float, spread: float = 0.1) -> dict[str, Any]:
    values = [mean - spread, mean, mean + spread]
    return {"mean": mean, "low": mean - 2 * spread, "high": mean + 2 * spread, "values": values}


def both(mean: float) -> dict[str, Any]:
    return {"heldout": summary(mean), "reference": summary(mean + 0.2)}


def gain(mean: float, half: float = 0.05) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def put(folder: Path, name: str, value: object) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def search_result(checkpoints: Sequence[str], groups: Sequence[str]) -> dict[str, Any]:
    """result.json of a search; coefficients are drawn with a fixed seed."""
    draw = random.Random(0)
    count = len(checkpoints)
    rows = [[draw.gauss(0, 0.3) for _ in checkpoints] for _ in groups]
    start = [[0.0] * (count - 1) + [1.0]] * len(groups)
    levels = {"start": 1.5, "uniform": 1.9, "best single": 1.4, "result": 1.1}
    return {
        "version": "0.0.1", "checkpoints": list(checkpoints), "groups": list(groups),
        "coefficients": rows, "search_images": 1900, "rounds": 3, "images": {},
        "start": {"label": "newest", "coefficients": start, "images": 100, "rungs": [],
                  "score": None, "images_each": 0},
        "final": {"chosen": "mean", "images": 200, "rungs": [], "score": None, "images_each": 0,
                  "fresh_score": None, "optimism": -0.031, "again_images": 700},
        "comparison": {
            "metric": "fid", "num_images": 100, "repeats": 3, "headline": "heldout",
            "best_single": checkpoints[0],
            "entries": {name: both(mean) for name, mean in levels.items()},
            "gain_over": {k: gain(v - 1.1) for k, v in levels.items() if k != "result"},
            "second": {"metric": "kid", "gain_over_start": gain(-0.01, 0.005),
                       "entries": {"start": summary(0.02, 0.001), "result": summary(0.03, 0.001)}},
            "floor": 0.6,
        },
        "warnings": ["FID to the reference improved, but KID did not"],
    }  # fmt: skip


def rounds(count: int, checkpoints: int) -> list[dict[str, Any]]:
    return [
        {"kind": "round", "round": i, "images": 400 + 500 * i, "rewards": [-2.0, -1.9],
         "failed": 0, "coefficients": [checkpoints * [0.5]], "pool_before": 3.0,
         "gap": 0.02 * (-1) ** i, "pool_after": 3.0 - 0.4 * i, "heldout": 3.1 - 0.3 * i,
         "seconds": 2.0,
         "rollout_seconds": 1.8}
        for i in range(count)
    ]  # fmt: skip


def search_run(
    folder: Path, checkpoints: Sequence[str], groups: Sequence[str] = ("all",), *,
    finished: bool = True, pictures: bool = True, set_name: str = "digits",
) -> Path:  # fmt: skip
    """A run of a search, with pictures of 2 x 2 pixels."""
    config = OptimizeConfig(checkpoints=f"/data/{set_name}", budget=2000, seed=3)
    reward = dataclasses.replace(config.reward, pool_size=100)
    evaluation = dataclasses.replace(config.evaluation, selection_images=1000)
    config = dataclasses.replace(config, reward=reward, evaluation=evaluation)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    hashes = {name: f"{index:064x}" for index, name in enumerate(checkpoints)}
    inputs = {"hashes": {"checkpoints": hashes, "reference": "f" * 64}, "version": "0.0.1"}
    put(folder, "inputs.json", inputs)
    lines = "".join(json.dumps(event) + "\n" for event in rounds(3, len(checkpoints)))
    (folder / "events.jsonl").write_text(lines, encoding="utf-8")
    if finished:
        put(folder, "result.json", search_result(checkpoints, groups))
    if pictures:
        record = {"height": 2, "width": 2, "columns": 2, "first_seed": 3, "labels": [0, 1, 2]}
        put(folder, "samples/samples.json", record)
        for entry, level in (("start", 50), ("result", 200)):
            pixels = np.full((4, 4), level, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"samples/{entry}.png")
    return folder


def tuning_run(folder: Path, *, finished: bool = True, model: str = "sit") -> Path:
    """A fine-tuning run of 20 steps, scored every ten."""
    config = FinetuneConfig(model=f"/data/{model}", steps=20)
    folder.mkdir(parents=True)
    (folder / "finetune.yaml").write_text(dump_config(config), encoding="utf-8")
    put(folder, "inputs.json", {"hashes": {"model": "a" * 64}, "version": "0.0.1"})
    points = {
        str(step): {c: {"heldout": 3.0 - step / 20 + i, "reference": 3.0} for i, c in
                    enumerate(CURVES)}
        for step in (0, 10, 20)
    }  # fmt: skip
    put(folder, "curves.json", points)
    steps = [{"kind": "step", "step": i, "images": 10 * i, "seconds": 0.5} for i in range(1, 21)]
    lines = "".join(json.dumps(event) + "\n" for event in steps)
    (folder / "events.jsonl").write_text(lines, encoding="utf-8")
    (folder / "samples").mkdir()
    for step in (0, 20):
        pixels = np.full((6, 6), 20 + 8 * step, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"samples/step-{step:07d}.png")
    if finished:
        section = {"entries": {"start": both(3.0), "result": both(2.0)}, "gain": gain(1.0)}
        comparison = {
            "num_images": 50, "repeats": 3, "headline": "heldout",
            "curves": dict.fromkeys(CURVES, section),
        }  # fmt: skip
        put(folder, "result.json", {
            "version": "0.0.1", "step": 20, "images": 200, "skipped": 0, "comparison": comparison,
        })  # fmt: skip
    return folder


def spread(*values: float) -> dict[str, Any]:
    ends = sorted(values)
    return {"median": ends[len(ends) // 2], "low": ends[0], "high": ends[-1], "values": values}


def searcher(name: str, *ends: float) -> dict[str, Any]:
    """A line of compare.json whose curve falls from twice its end to it."""
    curve = [
        {"images": images, "heldout": spread(*(factor * end for end in ends)),
         "reference": spread(*ends)}
        for images, factor in ((100, 2.0), (200, 1.5), (400, 1.0))
    ]  # fmt: skip
    return {
        "searcher": name, "name": name, "settings": {}, "images": 400,
        "fid": {"heldout": spread(*ends), "reference": spread(*ends)}, "optimism": 0.01,
        "seconds": 3.0, "overhead": 0.1, "coefficient_spread": 0.2, "largest_coefficient": 1.2,
        "curve": curve, "ratio": 0.9, "runs": [],
    }  # fmt: skip


def comparison_folder(folder: Path, lines: Sequence[Mapping[str, Any]] | None) -> Path:
    """A comparison on three seeds; None: not finished."""
    folder.mkdir(parents=True)
    shared = to_mapping(OptimizeConfig(checkpoints="/data/digits", budget=400))
    settings = {"config": shared, "curve_images": 50}
    put(folder, "settings.json", {
        "version": "0.0.1", "settings": settings, "inputs": {"reference": "f" * 64},
    })  # fmt: skip
    if lines is None:
        search_run(folder / "a-seed0", ["x", "y"])
        search_run(folder / "a-seed1", ["x", "y"], finished=False)
        return folder
    fixed = {
        name: {"fid": both(level), "curve": {"heldout": level, "reference": level}}
        for name, level in (("newest", 1.4), ("uniform average", 1.8), ("best single", 1.2))
    }
    put(folder, "compare.json", {
        "version": "0.0.1", "metric": "fid", "checkpoints": ["x", "y"], "budget": 400,
        "seeds": [0, 1, 2], "evaluation_seed": 0, "num_images": 50, "repeats": 3,
        "curve_images": 50, "headline": "heldout", "device": "cpu", "threads": 1,
        "best_single": "x", "fixed": fixed, "best_free": {"entry": "best single", "fid": 1.2},
        "best_baseline": None, "searchers": list(lines), "left_out": [],
    })  # fmt: skip
    return folder
