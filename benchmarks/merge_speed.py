"""A linear merge of K checkpoints of XS size, against reading the files once, and against mergekit.

Prints a table and, with `--out`, writes the same numbers as JSON. mergekit is compared with if
`--mergekit` names its command `mergekit-pytorch`, installed in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

import merge_rl as mrl
from benchmarks.moments import seconds
from merge_rl.storage.checkpoints.model_file import save_checkpoint

XS = {"model": "edm2", "img_resolution": 64, "img_channels": 4, "label_dim": 1000,
      "model_channels": 128, "dropout": 0.0, "use_fp16": True}  # fmt: skip
CHUNK = 16 * 2**20


def write_files(folder: Path, count: int, seed: int) -> int:
    """`count` random float16 files of XS shape; the bytes of all."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in mrl.build_model(XS).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        weights = {k: torch.randn(s, generator=generator).half() for k, s in shapes.items()}
        save_checkpoint(folder / f"xs-{index}.safetensors", weights, {"config": XS})
    return sum(file.stat().st_size for file in folder.iterdir())


def read_once(folder: Path) -> None:
    buffer = memoryview(bytearray(CHUNK))
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def hash_once(folder: Path) -> None:
    opened = mrl.open_checkpoints(folder)
    for index in opened.hashes.missing():
        opened.sha256(index)


def command(arguments: list[str], out: Path, repeats: int) -> dict[str, float]:
    """Median time, wall and processor, and largest memory of a command that writes `out`."""
    times, peaks, spent = [], [], []
    for _ in range(repeats):
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        wrapped = [sys.executable, "-c", _WRAPPER, *arguments]
        text = subprocess.run(wrapped, capture_output=True, text=True, check=True).stdout
        times.append(time.perf_counter() - start)
        peak, processor = map(float, text.splitlines()[-1].split())
        peaks.append(peak)
        spent.append(processor)
    return {
        "seconds": statistics.median(times), "processor_s": statistics.median(spent),
        "peak_mb": max(peaks),
    }  # fmt: skip


# Runs a command and says how much memory it took at most, and how much time of processors.
_WRAPPER = """
import resource, subprocess, sys
ended = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
if ended.returncode:
    sys.exit(ended.stderr[-2000:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_maxrss * 1024 / 1e6, used.ru_utime + used.ru_stime)
"""

_PEAK = """
import sys, torch, merge_rl as mrl
def status(key):
    rows = (line.split() for line in open("/proc/self/status"))
    return next(int(row[1]) for row in rows if row[0] == key + ":") * 1024 / 1e6
opened = mrl.open_checkpoints(sys.argv[1])
torch.ones(10) + 1
before = status("VmRSS")
merged = mrl.merge(opened, [1 / len(opened)] * len(opened))
print(status("VmHWM") - before, sum(t.numel() * t.element_size() for t in merged.values()) / 1e6,
      max(t.numel() * t.element_size() for t in merged.values()) / 1e6)
"""


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    sources, repeats = folder / "sources", options.repeats
    sources.mkdir()
    total = write_files(sources, options.count, options.seed)
    opened = mrl.open_checkpoints(sources)
    coefficients = [1 / options.count] * options.count
    read = seconds(lambda: read_once(sources), repeats)
    merge = seconds(lambda: mrl.merge(opened, coefficients), repeats)
    peak = subprocess.run(
        [sys.executable, "-c", _PEAK, str(sources)], capture_output=True, text=True, check=True
    ).stdout.split()
    result: dict[str, Any] = {
        "checkpoints": options.count,
        "gigabytes": total / 1e9,
        "threads": torch.get_num_threads(),
        "read_once_s": read,
        "hash_once_s": seconds(lambda: hash_once(sources), 1),
        "merge_s": merge,
        "speed_of_reading": read / merge,
        "peak_above_start_mb": float(peak[0]),
        "output_mb": float(peak[1]),
        "largest_tensor_mb": float(peak[2]),
    }
    out = folder / "out"
    ours = [sys.executable, "-m", "merge_rl", "merge", str(sources), str(out), "--uniform"]
    result["command"] = command([*ours, "--dtype", "float16"], out, repeats)
    if options.mergekit:
        files = [{"model": str(path), "parameters": {"weight": 1.0}} for path in opened.paths]
        recipe = {"merge_method": "linear", "models": files, "dtype": "float16"}
        (folder / "linear.yaml").write_text(yaml.safe_dump(recipe))
        theirs = [options.mergekit, str(folder / "linear.yaml"), str(out)]
        result["mergekit"] = command(theirs, out, repeats)
        for name, key in (("faster_than_mergekit", "seconds"), ("less_work", "processor_s")):
            result[name] = result["mergekit"][key] / result["command"][key]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to put the files (5 GB)")
    parser.add_argument("--mergekit", help="mergekit's command mergekit-pytorch")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(Path(folder), options)
    for name, value in result.items():
        shown = value if isinstance(value, dict) else f"{value:.4g}"
        print(f"{name:24} {shown}")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
