"""Converting an EDM2 snapshot of the XS size, against copying the file and reading it once.

The snapshot is synthetic: the published network's names and shapes, random float16. Peak memory is
that of a process of its own, libraries included. Run from the repository's root:

    python -m benchmarks.convert [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from merge_rl.registry import build_model
from merge_rl.storage.checkpoints.catalogue import load_catalogue
from merge_rl.storage.convert.run import convert
from tests.snapshots import random_weights, write_snapshot

CHUNK = 2**20
CHILD = """
import re, sys
from pathlib import Path
from merge_rl.storage.convert.run import convert

def peak():  # of this program; getrusage would count the process that it was started from
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = peak()
convert(sys.argv[1], sys.argv[2], workers=1)
print(before, peak())
"""


def make_snapshot(name: str, folder: Path) -> Path:
    """A snapshot of the catalogue's network `name`, with random weights."""
    config = dict(load_catalogue().find(name).model or {})
    with torch.device("meta"):
        state = build_model(config).state_dict()
    shapes = [(key, tuple(tensor.shape)) for key, tensor in state.items()]
    weights = random_weights(shapes, torch.float16, seed=0)
    path = folder / "network-snapshot-0008388-0.050.pkl"
    write_snapshot(path, weights, {key: v for key, v in config.items() if key != "model"})
    return path


def copy_and_read(source: Path, target: Path) -> None:
    """What any conversion takes at least: the file is copied, and read once."""
    shutil.copyfile(source, target)
    with target.open("rb") as copy:
        os.fsync(copy.fileno())  # the conversion, too, has its output on the disk when it ends
    with target.open("rb", buffering=0) as file:
        while file.read(CHUNK):
            pass


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and processor time of a call."""
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - processor


def measure(name: str, repeats: int, folder: Path) -> dict[str, float | str]:
    source = make_snapshot(name, folder)
    size, out = source.stat().st_size, folder / "out"
    baseline, ours, again = [], [], []
    for _ in range(repeats):  # in turn, so that both meet the same load of the machine
        baseline.append(seconds(lambda: copy_and_read(source, folder / "copy")))
        shutil.rmtree(out, ignore_errors=True)
        ours.append(seconds(lambda: convert(source, out, workers=1)))
        again.append(seconds(lambda: convert(source, out, workers=1)))
    shutil.rmtree(out)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(source), str(out)], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    libraries, peak = map(int, child.stdout.split())
    wall = {
        key: statistics.median(pair[0] for pair in pairs)
        for key, pairs in (("copy", baseline), ("convert", ours), ("verified", again))
    }
    return {
        "network": name,
        "file_mb": size / 1e6,
        "copy_and_read_s": wall["copy"],
        "convert_s": wall["convert"],
        "convert_cpu_s": statistics.median(pair[1] for pair in ours),
        "kept_after_check_s": wall["verified"],
        "convert_mb_per_s": size / 1e6 / wall["convert"],
        "speed_of_copy_and_read": wall["copy"] / wall["convert"],
        "speed_of_copy_and_read_best": min(p[0] for p in baseline) / min(p[0] for p in ours),
        "peak_mb": peak / 1e6,
        "peak_of_libraries_mb": libraries / 1e6,
        "peak_per_file": peak / size,
        "peak_beyond_libraries_per_file": (peak - libraries) / size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--network", default="edm2-img512-xs", help="a set of the catalogue")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary one by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(options.network, options.repeats, Path(folder))
    for name, value in result.items():
        print(f"{name:30} {value if isinstance(value, str) else format(value, '.4g')}")
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
