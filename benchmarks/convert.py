"""Converting an EDM2 snapshot of the XS size, against copying the file and reading it once.

The snapshot is synthetic: the published network's names and shapes, random float16. Peak memory is
that of a process of its own, libraries included. With `--formats`, the same weights as each library
writes them, against a plain state dict of them; and the snapshot's weights as torch.distributed
writes them, against the snapshot. Run from the repository's root:

    python -m benchmarks.convert [--out FILE.json]
    python -m benchmarks.convert --formats [--megabytes 128]
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
from merge_rl.storage.files import save_tensors
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


def make_snapshot(name: str, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A snapshot of the catalogue's network `name`, and the random weights that it holds."""
    config = dict(load_catalogue().find(name).model or {})
    with torch.device("meta"):
        state = build_model(config).state_dict()
    shapes = [(key, tuple(tensor.shape)) for key, tensor in state.items()]
    weights = random_weights(shapes, torch.float16, seed=0)
    path = folder / "network-snapshot-0008388-0.050.pkl"
    write_snapshot(path, weights, {key: v for key, v in config.items() if key != "model"})
    return path, weights


def write_formats(folder: Path, megabytes: int) -> dict[str, Path]:
    """Format -> a file or folder of float16 weights of that size, as its library writes them."""
    from torch.distributed.checkpoint.state_dict_saver import save

    shapes = [(f"layers.{i}.weight", (1024, 1024)) for i in range(megabytes // 2)]
    weights = random_weights(shapes, torch.float16, seed=0)
    prefixed = {f"model.{name}": value for name, value in weights.items()}
    average = {f"ema_model.{name}": value for name, value in weights.items()}
    counts = {"initted": torch.ones(()).half(), "step": torch.tensor(1000.0).half()}
    factors = {
        f"base_model.model.{i}.lora_{part}.weight": value.reshape(shape)
        for i, value in enumerate(weights.values())
        for part, shape in (("A", (16, 65536)), ("B", (65536, 16)))
    }
    places = {
        name: folder / name / "checkpoint-1000" for name in ("accelerate", "diffusers", "peft")
    }
    parts = {
        places["accelerate"] / "model.safetensors": weights,
        places["diffusers"] / "unet" / "diffusion_pytorch_model.safetensors": weights,
        places["diffusers"] / "unet_ema" / "diffusion_pytorch_model.safetensors": weights,
        places["peft"] / "adapter_model.safetensors": factors,
    }
    for path, tensors in parts.items():
        path.parent.mkdir(parents=True)
        save_tensors(path, tensors, {"format": "pt"})
    settings = {"peft_type": "LORA", "r": 16, "lora_alpha": 16}
    (places["peft"] / "adapter_config.json").write_text(json.dumps(settings))
    files = {
        "weights": (folder / "state.pt", weights),
        "posthoc-ema": (folder / "0.1000.pt", average | counts),
        "lightning": (
            folder / "a.ckpt", {"state_dict": prefixed, "epoch": 1, "global_step": 1000},
        ),
    }  # fmt: skip
    for path, data in files.values():
        torch.save(data, path)
    save({"model": weights}, checkpoint_id=folder / "distcp/step_1000")
    found = {name: path for name, (path, _) in files.items()}
    return {**found, **places, "distcp": folder / "distcp/step_1000"}


def write_network(name: str, folder: Path) -> dict[str, Path]:
    """A network of the catalogue as an EDM2 snapshot, and its weights by torch.distributed."""
    from torch.distributed.checkpoint.state_dict_saver import save

    (snapshot, weights), pieces = make_snapshot(name, folder), folder / "network/step_1000"
    save({"model": weights}, checkpoint_id=pieces)
    return {f"{name} snapshot": snapshot, f"{name} distcp": pieces}


def measure_formats(
    network: str, megabytes: int, repeats: int, folder: Path
) -> dict[str, float | str]:
    """MB of output a second of processor time, of each format, and relative to a state dict."""
    out, rates = folder / "out", dict[str, list[float]]()
    places = write_formats(folder, megabytes) | write_network(network, folder)
    for _ in range(repeats):  # in turn, so that all meet the same load of the machine
        for name, path in places.items():
            shutil.rmtree(out, ignore_errors=True)
            _, took = seconds(lambda path=path: convert(path, out, workers=1))  # type: ignore[misc]
            written = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
            rates.setdefault(name, []).append(written / 1e6 / took)
    plain = statistics.median(rates["weights"])
    found: dict[str, float | str] = {"megabytes": megabytes}
    for name, each in rates.items():
        found[f"{name} MB/s"] = statistics.median(each)
        found[f"{name} of a state dict's speed"] = statistics.median(each) / plain
    pieces, snapshot = (
        statistics.median(rates[f"{network} {of}"]) for of in ("distcp", "snapshot")
    )
    found[f"{network} distcp of its snapshot's speed"] = pieces / snapshot
    return found


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
    source, _ = make_snapshot(name, folder)
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
    parser.add_argument("--formats", action="store_true", help="the formats of libraries instead")
    parser.add_argument("--megabytes", type=int, default=128, help="of weights in each format")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = (
            measure_formats(options.network, options.megabytes, options.repeats, Path(folder))
            if options.formats
            else measure(options.network, options.repeats, Path(folder))
        )
    for name, value in result.items():
        print(f"{name:42} {value if isinstance(value, str) else format(value, '.4g')}")
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
