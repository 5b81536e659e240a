"""The table of docs/results/gpu.md in one command: every figure in a process of its own.

    python -m benchmarks.gpu [--only NAMES] [--out DIR] [--seconds-limit S]
    python -m benchmarks.gpu --device cpu --tiny   # to try it where there is no GPU

The most valuable come first. Each row is printed as Markdown as soon as it is measured, and all so
far are in DIR/gpu.json: a run that is cut short still tells. A figure has a limit of its own, and
never more than what is left of `--seconds-limit`; the end of what it printed is kept, whether or
not it came to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

Rows = list[list[str]]
"""What, N, measured."""
ROOT: Final = Path(__file__).parents[1]
KEPT: Final = 3000  # characters of what a figure printed


@dataclass(frozen=True)
class Task:
    """One process: a benchmark, what it is called with, and what its document says."""

    name: str
    module: str
    arguments: str = ""  # on a GPU
    tiny: str | None = None  # to try the script with; None: it needs a GPU
    limit: int = 60
    rows: Callable[[Mapping[str, Any]], Rows] = lambda document: document["rows"]

    def command(self, device: str, tiny: bool, out: Path) -> list[str]:
        said = self.arguments if not tiny else self.tiny or ""
        return [
            sys.executable, "-m", f"benchmarks.{self.module}", *said.split(), "--device", device,
            "--out", str(out),
        ]  # fmt: skip


def merge_rows(found: Mapping[str, Any]) -> Rows:
    speed = found["copy_bytes_per_s"] / 1e12
    rows = []
    for row in found["merges"]:
        times = {key: f"{1e3 * row[key]:.1f} ms" for key in row if key.endswith("seconds")}
        text = f"{times.pop('seconds')}, floor {times.pop('floor_seconds')}"
        text += "".join(f", {key.removesuffix('_seconds')} {value}" for key, value in times.items())
        what = f"a merge of 8 checkpoints of SiT-XL/2, {row['dtype']}, a copy at {speed:.2f} TB/s"
        rows.append([what, "median", text])
    rates = [f"{row['way']} {found['images'] / row['seconds']:.1f}" for row in found["rollouts"]]
    shares = [f"{row['way']} {row['share']:.2%}" for row in found["rollouts"]]
    images = f"{found['images']} images"
    rows.append(["images a second, SiT-XL/2, 8 Heun steps", images, ", ".join(rates)])
    return [*rows, ["a float32 merge in the time of those", images, ", ".join(shares)]]


def sampling_rows(found: Mapping[str, Any]) -> Rows:
    rows = []
    for row in found["rows"]:
        text = f"{row['images_per_s']:,.1f} beside {row['plain_images_per_s']:,.1f}"
        text += f" (time ratio {row['time_ratio']:.3f}, nfe {row['nfe']})"
        rows.append(
            [f"`sample` against a plain eager loop, {row['name']}", str(row["batch"]), text]
        )
    return rows


def precision_rows(found: Mapping[str, Any]) -> Rows:
    rows = []
    for name, lines in found["rows"].items():
        first = lines[0]
        text = f"{first['mean']:.4f} [{first['low']:.4f}, {first['high']:.4f}]"
        text += "".join(f"; {line['precision']} {line['change']:+.4f}" for line in lines[1:])
        rows.append([f"FID of the digits {name}, float32, and its change", "repeats", text])
    return rows


def reward_rows(found: Mapping[str, Any]) -> Rows:
    rows = []
    for name, row in found["methods"].items():
        all_of_them = row["candidate_s"] * found["candidates"]
        text = f"{all_of_them:.4f} s and {row['prepare_s']:.4f} s to prepare the pool"
        rows.append([f"{found['candidates']} rewards, {name}", "median of 3",
                     f"{text}; {row['error']:.1e} relative"])  # fmt: skip
    return rows


def extractor_rows(found: Mapping[str, Any]) -> Rows:
    rates = {k: v for k, v in found.items() if isinstance(v, float)}
    text = ", ".join(f"{name} {value:,.0f}" for name, value in rates.items())
    return [["images of 256 x 256 a second", "best of 3", text]]


def overlap_rows(found: Mapping[str, Any]) -> Rows:
    one, two = (found["images_per_s"][name] for name in ("one stream", "two streams"))
    text = f"{one:.1f} and {two:.1f} ({two / one:.3f}x), equal features: {found['equal']}"
    return [["SiT-XL/2, VAE, Inception: images/s on one stream and on two", "median of 3", text]]


def plan_rows(found: Mapping[str, Any]) -> Rows:
    texts = [f"{row['planned']:.1f} and {row['measured']:.1f}" for row in found["rows"]]
    return [["seconds that a plan says and that the run takes", str(len(texts)), "; ".join(texts)]]


def training_rows(found: Mapping[str, Any]) -> Rows:
    peaks = [f"{k} steps {v / 2**20:,.0f} MiB" for k, v in found["memory"]["peaks"].items()]
    return [["peak memory of a training step, SiT-B/2, 32 images", "one run", ", ".join(peaks)]]


SAMPLING: Final = "--steps 4 --scale 25 --repeats 2 --only"
FIGURES: Final = "gpu_figures"
TASKS: Final = (
    Task("rounds", FIGURES, "rounds", "rounds --tiny", limit=120),
    Task("pass", FIGURES, "pass", "pass --tiny"),
    Task("memory", FIGURES, "memory", "memory --tiny"),
    Task("vae", FIGURES, "vae", "vae --tiny", limit=150),
    Task("fast", "sampling_speed", f"{SAMPLING} fast --fast",
         "--steps 2 --repeats 1 --only digits", 180, sampling_rows),
    Task("gradient", FIGURES, "gradient", "gradient --tiny", limit=240),
    Task("plan", "plan_accuracy", "--runs 2 --budget 6000", limit=90, rows=plan_rows),
    Task("merge", "merge_share", "--repeats 3", limit=120, rows=merge_rows),
    Task("overlap", "overlap", limit=120, rows=overlap_rows),
    Task("precision", "precision_fid", "--num-images 2000 --repeats 4",
         "--num-images 20 --repeats 3", 120, precision_rows),
    Task("reward", "reward_speed", "--candidates 128 --sqrtm 0",
         "--dim 16 --pool 60 --subset 5 --candidates 4 --sqrtm 0", rows=reward_rows),
    Task("sampling", "sampling_speed", f"{SAMPLING} heun", limit=120, rows=sampling_rows),
    Task("extractors", "extractors", "--images 200 --only dinov2", rows=extractor_rows),
    Task("training", "finetune", "--what memory", limit=60, rows=training_rows),
)  # fmt: skip


def run(task: Task, device: str, tiny: bool, limit: float) -> dict[str, Any]:
    """What one process came to: its document and rows, or why there are none."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        out, log = Path(name) / "found.json", Path(name) / "log"
        with log.open("w") as file:
            process = subprocess.Popen(
                task.command(device, tiny, out), stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"}, start_new_session=True,
            )  # fmt: skip
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:  # compilers leave processes behind
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        printed = log.read_text(errors="replace")[-KEPT:]
        found: dict[str, Any] = {"seconds": time.monotonic() - began, "printed": printed}
        if not out.is_file():
            reason = f"more than {limit:.0f} s" if code is None else f"exit code {code}"
            last = [line for line in printed.splitlines() if line.strip()][-1:]
            return {**found, "rows": [], "failed": ": ".join([reason, *last])}
        document = json.loads(out.read_text())
    return {**found, "rows": task.rows(document), "document": document}


def chosen(only: str) -> list[Task]:
    """The tasks of those names; SystemExit names one that there is not."""
    known = {task.name: task for task in TASKS}
    names = only.split(",") if only else list(known)
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"expected figures among {', '.join(known)}, got {', '.join(unknown)}")
    return [known[name] for name in names]


def device_name(device: str) -> str:
    """Card and version, for the head of the table."""
    import torch

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    return f"{name}, PyTorch {torch.__version__}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The figures of a GPU.")
    parser.add_argument("--only", default="", help=f"of {', '.join(task.name for task in TASKS)}")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--seconds-limit", type=float, default=3600)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="what needs no GPU, of tiny networks")
    given = parser.parse_args(arguments)
    ends, tasks = time.monotonic() + given.seconds_limit, chosen(given.only)
    given.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"device": device_name(given.device), "figures": {}}
    print(f"{found['device']}\n\n| what | N | measured |\n| --- | --- | --- |", flush=True)
    for task in tasks:
        left = ends - time.monotonic()
        if given.tiny and task.tiny is None:
            continue
        made: dict[str, Any] = {"rows": [], "failed": "no time was left"}
        if left > 0:
            made = run(task, given.device, given.tiny, min(left, task.limit))
        found["figures"][task.name] = made
        for row in made["rows"]:
            print(f"| {' | '.join(map(str, row))} |", flush=True)
        if "failed" in made:
            print(f"| {task.name} | - | not measured: {made['failed']} |", flush=True)
            print("\n".join(f"    {line}" for line in made.get("printed", "").splitlines()[-12:]))
        text = json.dumps(found, indent=1, default=str)
        (given.out / "gpu.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
