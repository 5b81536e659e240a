"""Does fine-tuning with the distribution-wise reward pay on the embedded digits runs?

    python -m benchmarks.finetune [--what quality,memory,recipes,pathwise] [--seeds 0,1,2]
                                  [--out FILE.json]

quality   SiT, policy gradient, both credits, three seeds: held-out FID under the SDE after the last
          step against the start, recall, and how many steps per-image credit needs to reach the
          value that set-level credit ends with. Goals: at most 0.85 (median), recall not lower by
          more than 0.03, at most 0.7 of the steps.
memory    peak memory of a process that makes training steps with 5 and with 50 solver steps.
          Goal: within 10 %.
recipes   the four recipes of the package, one seed: FID at start and end with intervals, seconds.
pathwise  SiT, the recipes of policy gradient and pathwise: steps and seconds of training to where
          the policy gradient ends under the SDE, gain under the ODE, and what neither has seen:
          KID, FID of pixels, precision and recall. Goals: a fifth of steps and seconds, a gain
          beyond its interval, no other metric worse than the start's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks.digits_data import load_images, split_in_halves
from merge_rl.config.finetune import FinetuneConfig
from merge_rl.config.mapping import load_config
from merge_rl.config.sampler import SamplerConfig
from merge_rl.core.distances.frechet import frechet_distance
from merge_rl.core.distances.kernels import kernel_distance
from merge_rl.core.distances.neighbours import prdc
from merge_rl.core.distances.statistics import feature_stats
from merge_rl.core.sampling.compatibility import balanced_labels
from merge_rl.demo import write_demo
from merge_rl.interfaces import FeatureExtractor
from merge_rl.rng import image_seeds
from merge_rl.workflows.assembly.defaults import load_model
from merge_rl.workflows.assembly.extractors import build_extractor
from merge_rl.workflows.assembly.parts import network_rollout
from merge_rl.workflows.finetune.run import FinetuneResult, finetune
from merge_rl.workflows.finetune.step import peak_memory
from merge_rl.workflows.rollout.rollout import Rollout

GOAL, RECALL_GOAL, STEPS_GOAL, MEMORY_GOAL = 0.85, 0.03, 0.7, 1.10
CURVE: Final = "sde-eval"
NEWEST: Final = "raw/digits-0002097.safetensors"
RECIPES: Final = ("sit", "sit-rs", "edm2", "edm2-rs")


def recipe(name: str, model: Path, **changes: Any) -> FinetuneConfig:
    """A recipe of the package for a model that lies elsewhere."""
    config = load_config(FinetuneConfig, Path(f"finetune-digits-{name}"))
    return replace(config, model=str(model), **changes)


# ------------------------------------------------------------------------------------- quality


def recall_of(model: nn.Module, extractor: FeatureExtractor, held: Tensor, steps: int) -> float:
    """Recall of the held-out images under the SDE, as many generated as there are."""
    sampler = SamplerConfig(solver="sde-euler", num_steps=steps)
    rollout = network_rollout(model, sampler, 250, "cpu", Rollout, extractor=extractor)
    noise = rollout.noise(image_seeds(len(held), 0, "recall"))
    fake = rollout.features(noise, balanced_labels(len(held), 10))
    return float(prdc(held, fake, 5).recall)


def quality_config(model: Path, credit: str, seed: int, steps: int) -> FinetuneConfig:
    """The recipe with few images a score.

    Per-image credit takes half the steps with half the rate: the gradients of images that
    earned by themselves agree more, so that a step of Adam's goes further.
    """
    base = recipe("sit", model)
    curves = replace(base.curves, every=10 if credit == "per-image" else 50, num_images=200,
                     final_images=400, repeats=2)  # fmt: skip
    config = replace(base, credit=credit, seed=seed, curves=curves, steps=steps)
    if credit == "set":
        return config
    update = replace(base.update, learning_rate=base.update.learning_rate / 2)
    return replace(config, steps=steps // 2, update=update)


def quality_row(folder: Path, credit: str, seed: int, steps: int) -> dict[str, Any]:
    """One run."""
    model = folder / "sit" / NEWEST
    config = quality_config(model, credit, seed, steps)
    began = time.monotonic()
    result = finetune(model, out=folder / f"{credit}-{seed}", config=config)
    seconds = time.monotonic() - began
    evaluation = folder / "sit/evaluation/extractor.safetensors"
    extractor, _ = build_extractor("digits", str(evaluation))
    images, labels = load_images()
    held = extractor(images[split_in_halves(labels)["heldout"]]).float()
    paths = (result.run_dir / "snapshots/start-0000000.safetensors", result.model_path)
    recalls = [
        recall_of(load_model(path), extractor, held, config.curves.eval_steps) for path in paths
    ]
    section = result.comparison["curves"][CURVE]["entries"]
    return {
        "credit": credit,
        "seed": seed,
        "steps": config.steps,
        "learning_rate": config.update.learning_rate,
        "seconds": seconds,
        "start": section["start"]["heldout"],
        "result": section["result"]["heldout"],
        "ratio": section["result"]["heldout"]["mean"] / section["start"]["heldout"]["mean"],
        "recall": recalls,
        "curve": {step: point[CURVE]["heldout"] for step, point in result.curves.items()},
        "gains": {c: s["gain"] for c, s in result.comparison["curves"].items()},
    }


def first_step_below(curve: dict[int, float], value: float) -> int | None:
    """The first scored step at or below a value."""
    return next((step for step in sorted(curve) if curve[step] <= value), None)


def quality(folder: Path, seeds: list[int], steps: int) -> dict[str, Any]:
    """Rows of both credits, and what the goals ask of them."""
    rows = []
    print(f"SiT, policy gradient: held-out FID under the SDE, set-level credit for {steps} steps")
    print(
        f"{'credit':>10} {'seed':>4} {'start':>7} {'result':>7} {'ratio':>6} {'recall':>15}"
        f" {'s':>6}  FID along the run, N = 200"
    )
    for seed in seeds:
        for credit in ("set", "per-image"):
            row = quality_row(folder, credit, seed, steps)
            rows.append(row)
            before, after = row["recall"]
            print(
                f"{credit:>10} {seed:>4} {row['start']['mean']:7.3f} {row['result']['mean']:7.3f} "
                f"{row['ratio']:6.3f} {before:7.3f} {after:7.3f} {row['seconds']:6.0f}  "
                + "  ".join(f"{step}: {value:.3f}" for step, value in row["curve"].items()),
                flush=True,
            )  # fmt: skip
    found: dict[str, Any] = {"rows": rows, "goal": GOAL}
    for credit in ("set", "per-image"):
        own = [row for row in rows if row["credit"] == credit]
        ratio = statistics.median(row["ratio"] for row in own)
        lost = statistics.median(row["recall"][0] - row["recall"][1] for row in own)
        found[credit] = {"ratio": ratio, "recall_lost": lost}
        good = ratio <= GOAL and lost <= RECALL_GOAL
        print(f"{credit}: median ratio {ratio:.3f} (goal {GOAL}), recall lost {lost:+.3f} "
              f"(goal {RECALL_GOAL}): {'reached' if good else 'missed'}")  # fmt: skip
    shares = [_share(rows, seed, steps) for seed in seeds]
    share = statistics.median(shares)
    found["per_image_share"] = None if share == float("inf") else share
    verdict = "reached" if share <= STEPS_GOAL else "missed"
    print(f"per-image credit reaches set-level's last value after {share:.2f} of the steps, median "
          f"(goal {STEPS_GOAL}): {verdict}")  # fmt: skip
    return found


def _share(rows: list[dict[str, Any]], seed: int, steps: int) -> float:
    """Steps that per-image credit needs to where set-level credit ends, over the latter's."""
    of_seed = {row["credit"]: row["curve"] for row in rows if row["seed"] == seed}
    whole = of_seed["set"]
    reached = first_step_below(of_seed["per-image"], whole[max(whole)])
    return float("inf") if reached is None else reached / steps


# ------------------------------------------------------------------------------------ pathwise


def pathwise_row(folder: Path, name: str, seed: int, **changes: Any) -> dict[str, Any]:
    """One recipe with one seed, scored eight times along the way."""
    model = folder / "sit" / NEWEST
    config = recipe(name, model, seed=seed, **changes)
    every = max(1, config.steps // 8)
    curves = replace(config.curves, every=every, num_images=300, final_images=300)
    config = replace(config, curves=curves, snapshot_every=config.steps)
    result = finetune(model, out=folder / f"{name}-{seed}", config=config, progress=False)
    lines = (result.run_dir / "events.jsonl").read_text().splitlines()
    events = [event for event in map(json.loads, lines) if event["kind"] == "step"]
    sections = result.comparison["curves"]
    start = result.run_dir / "snapshots/start-0000000.safetensors"
    return {
        "recipe": name, "seed": seed, "changes": str(changes),
        "seconds": {event["step"]: event["seconds"] for event in events},
        "curve": {step: point[CURVE]["heldout"] for step, point in result.curves.items()},
        "entries": {c: {e: v["heldout"] for e, v in s["entries"].items()}
                    for c, s in sections.items()},
        "gains": {c: s["gain"] for c, s in sections.items()},
        "others": {kind: {"start": other_metrics(folder, start, kind),
                          "result": other_metrics(folder, result.model_path, kind)}
                   for kind in ("euler", "sde-euler")},
    }  # fmt: skip


def other_metrics(folder: Path, model: Path, solver: str) -> dict[str, float]:
    """KID, FID of pixels, precision and recall against held-out digits, 50 steps."""
    extractor, _ = build_extractor("digits", str(folder / "sit/evaluation/extractor.safetensors"))
    images, labels = load_images()
    real = images[split_in_halves(labels)["heldout"]]
    network = load_model(model)
    rollout = network_rollout(network, SamplerConfig(solver=solver, num_steps=50), 250, "cpu",
                              Rollout, extractor=extractor)  # fmt: skip
    noise = rollout.noise(image_seeds(len(real), 0, "other metrics"))
    made = rollout.images(noise, balanced_labels(len(real), 10))
    fake, true = extractor(made).float(), extractor(real).float()
    pixels = [x[:, :1].flatten(1).double() / 255 for x in (made, real)]
    near = prdc(true, fake, 5)
    stats = [feature_stats(x) for x in pixels]
    return {
        "kid": kernel_distance(fake.double(), true.double()), "pixel_fid": frechet_distance(*stats),
        "precision": float(near.precision), "recall": float(near.recall),
    }  # fmt: skip


def pathwise(folder: Path, seeds: list[int]) -> dict[str, Any]:
    """Rows of both recipes, and how soon pathwise is where the policy gradient ends."""
    rows, reached = list[dict[str, Any]](), list[dict[str, Any]]()
    for seed in seeds:
        own = {name: pathwise_row(folder, name, seed) for name in ("sit", "sit-pathwise")}
        rows += own.values()
        whole, quick = own["sit"], own["sit-pathwise"]
        goal = whole["curve"][max(whole["curve"])]
        step = first_step_below(quick["curve"], goal)
        spent = sum(v for k, v in quick["seconds"].items() if step is not None and k <= step)
        reached.append({
            "seed": seed, "value": goal, "step": step, "of_steps": max(whole["curve"]),
            "seconds": spent if step is not None else None,
            "of_seconds": sum(whole["seconds"].values()),
        })  # fmt: skip
        print(json.dumps(reached[-1]))
        for row in own.values():
            print(row["recipe"], seed, json.dumps({k: row[k] for k in ("curve", "gains")}))
            print("   ", json.dumps(row["others"]), flush=True)
    return {"rows": rows, "reached": reached}


# ------------------------------------------------------------------------------------- memory


def memory_child(steps: int, device: str) -> None:
    """A training step of a SiT of some size (B/2 on a GPU); prints the peak memory in bytes."""
    from merge_rl.core.sampling.sampler import following, make_sde
    from merge_rl.core.step_policy import replay, step_loss
    from merge_rl.models.sit import SiT

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = (
        SiT(
            input_size=16, patch_size=2, in_channels=4, hidden_size=128, depth=4, num_heads=4,
            num_classes=10, learn_sigma=False,
        )
        if device == "cpu"
        else SiT(hidden_size=768, depth=12, num_heads=12)
    )  # fmt: skip
    model.eval().to(device)
    noise, labels = torch.randn(32, *model.sample_shape), torch.arange(32) % 10
    settings = SamplerConfig(solver="sde-euler", num_steps=steps)
    sde = make_sde(settings, model, labels.to(device))
    for action in replay(sde, noise.to(device), following(noise)):
        found = step_loss(sde, action, torch.ones(32, device=device), clip=0.2)
        found.loss.backward()  # type: ignore[no-untyped-call]
    print(peak_memory(device))


def memory(device: str) -> dict[str, Any]:
    """Peak memory at both numbers of steps."""
    peaks = {}
    for steps in (5, 50):
        command = [sys.executable, "-m", "benchmarks.finetune", "--memory-child", str(steps)]
        command += ["--device", device]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[steps] = int(done.stdout)
        print(f"{steps:>3} solver steps: peak {peaks[steps] / 2**20:.0f} MiB")
    ratio = peaks[50] / peaks[5]
    verdict = "reached" if ratio <= MEMORY_GOAL else "missed"
    print(f"ratio {ratio:.3f} (goal {MEMORY_GOAL}): {verdict}")
    return {"peaks": peaks, "ratio": ratio, "goal": MEMORY_GOAL}


# ------------------------------------------------------------------------------------- recipes


def recipes(folder: Path) -> list[dict[str, Any]]:
    """Each recipe as it is, with the wall time of the whole command."""
    rows = []
    for name in RECIPES:
        model = folder / name.partition("-")[0] / NEWEST
        began = time.monotonic()
        result: FinetuneResult = finetune(
            model, out=folder / f"recipe-{name}", config=recipe(name, model)
        )
        seconds = time.monotonic() - began
        section = result.comparison["curves"][CURVE]
        start, end = (section["entries"][entry]["heldout"] for entry in ("start", "result"))
        apart = end["high"] < start["low"]
        rows.append({"recipe": name, "seconds": seconds, "step": result.step, "apart": apart,
                     "comparison": result.comparison})  # fmt: skip
        texts = [f"{s['mean']:.3f} [{s['low']:.3f}, {s['high']:.3f}]" for s in (start, end)]
        print(f"{name:>8}: {texts[0]} -> {texts[1]} at step {result.step}, {seconds:.0f} s, "
              f"intervals {'apart' if apart else 'overlap'}", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tuning on the embedded digits runs.")
    parser.add_argument("--what", default="quality,memory,recipes")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--device", default="cpu", help="of memory")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory-child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_child:
        memory_child(arguments.memory_child, arguments.device)
        return
    wanted, document = arguments.what.split(","), {"threads": torch.get_num_threads()}
    found: dict[str, Any] = dict(document)
    with tempfile.TemporaryDirectory() as folder:
        write_demo(Path(folder))
        if "memory" in wanted:
            found["memory"] = memory(arguments.device)
        if "recipes" in wanted:
            found["recipes"] = recipes(Path(folder))
        if "pathwise" in wanted:
            found["pathwise"] = pathwise(Path(folder), [int(s) for s in arguments.seeds.split(",")])
        if "quality" in wanted:
            seeds = [int(text) for text in arguments.seeds.split(",")]
            found["quality"] = quality(Path(folder), seeds, arguments.steps)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
