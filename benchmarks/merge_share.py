"""What a merge costs beside the images that a candidate makes, on an accelerator.

    python -m benchmarks.merge_share [--device cuda] [--checkpoints 8] [--images 50] [--out FILE]

SiT-XL/2 (675 M weights, random): candidates' coefficients into the live network, from checkpoints
that lie on the device, and a rollout of 50 images with 8 Heun steps (nfe 16), exact and fast;
beside a merge its floor: every source read once and the result written once, at the speed of
a copy on the same device. Goal: a merge takes less than 5 % of the rollout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from merge_rl.config.sampler import SamplerConfig
from merge_rl.core.merging.buffers import FlatCheckpoints, FlatLayout, add_product
from merge_rl.core.merging.live_model import LiveModel
from merge_rl.core.sampling.sampler import sample_with
from merge_rl.models.sit import SiT
from merge_rl.workflows.rollout.compiled import prepare_network
from merge_rl.workflows.rollout.execution import matmul_precision

GOAL = 0.05
WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "tf32": {"precision": "tf32"},
    "bfloat16": {"precision": "bfloat16"},
    "fast (bfloat16, compiled)": {"precision": "bfloat16", "compile": True},
}


def seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median wall-clock time of a call, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        began = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_speed(device: torch.device, repeats: int) -> float:
    """Bytes a second of a copy of 1 GiB within the device, read and written."""
    source = torch.ones(2**28, device=device)
    target = torch.empty_like(source)
    return 2 * 2**30 / seconds(lambda: target.copy_(source), repeats, device)


def checkpoints_like(
    model: nn.Module, count: int, dtype: torch.dtype, device: torch.device
) -> FlatCheckpoints:
    """Random checkpoints on the device; tensors that are the same in all stay as they are."""
    kept = {name for name, _ in model.named_buffers()} | set(getattr(model, "fixed_names", ()))
    fixed = {name: t for name, t in model.state_dict().items() if name in kept}
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in fixed}
    layout = FlatLayout.of(shapes)
    matrix = torch.empty(count, layout.size, dtype=dtype, device=device)
    for row in matrix:
        row.normal_(std=0.02)
    return FlatCheckpoints(layout, matrix, fixed)


def merges(
    model: SiT, count: int, dtype: torch.dtype, speed: float, repeats: int, device: torch.device
) -> dict[str, Any]:
    """Seconds of a merge, as by default and by the chain of operations, and of its floor."""
    checkpoints = checkpoints_like(model, count, dtype, device)
    rows = torch.linspace(-0.5, 1.0, count)[None]

    def merged(given: FlatCheckpoints) -> float:
        live = LiveModel(model, given)
        return seconds(lambda: live.set_coefficients(rows), repeats, device)

    flat, sources = torch.empty(checkpoints.layout.size, device=device), checkpoints.matrix
    term = torch.empty_like(flat)

    def chain() -> None:
        for k, (source, factor) in enumerate(zip(sources, rows[0].tolist(), strict=True)):
            add_product(flat, source, factor, term, first=k == 0)

    moved = checkpoints.layout.size * (count * dtype.itemsize + 4)
    found = {
        "dtype": str(dtype).removeprefix("torch."), "seconds": merged(checkpoints),
        "chain_seconds": seconds(chain, repeats, device), "floor_seconds": moved / speed,
        "bytes": moved,
    }  # fmt: skip
    if device.type == "cuda" and dtype.itemsize == 2:
        for name, pinned in (("memory_seconds", False), ("pinned_seconds", True)):
            there = torch.empty(sources.shape, dtype=dtype, pin_memory=pinned)
            there.copy_(sources)
            found[name] = merged(FlatCheckpoints(checkpoints.layout, there, checkpoints.fixed))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Merges beside rollouts.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--checkpoints", type=int, default=8)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="SiT-S/2, to try the script")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = torch.device(given.device)
    torch.manual_seed(0)
    with device:
        model = SiT(hidden_size=384, depth=12, num_heads=6) if given.small else SiT()
    model.eval().requires_grad_(False)
    speed = copy_speed(device, given.repeats)
    print(f"a copy moves {speed / 1e12:.2f} TB/s, read and written", flush=True)
    found = [
        merges(model, given.checkpoints, dtype, speed, given.repeats, device)
        for dtype in (torch.float16, torch.float32)
    ]
    for row in found:
        print(
            f"merge of {given.checkpoints} in {row['dtype']}: {1e3 * row['seconds']:.1f} ms, floor "
            f"{1e3 * row['floor_seconds']:.1f} ms, chain {1e3 * row['chain_seconds']:.1f} ms; from "
            f"main memory {1e3 * row.get('memory_seconds', 0):.0f} ms, pinned "
            f"{1e3 * row.get('pinned_seconds', 0):.0f} ms"
        )
    noise = torch.randn(given.images, *model.sample_shape, device=device)
    labels = torch.arange(given.images, device=device)
    slowest, rows = max(row["seconds"] for row in found), []
    for name, changes in WAYS.items():
        if device.type == "cpu" and changes.get("compile"):
            continue
        settings = SamplerConfig(num_steps=given.steps, **changes)
        network = prepare_network(model, settings, device)
        with matmul_precision(settings), torch.no_grad():
            spent = seconds(
                lambda s=settings, n=network: sample_with(s, n, noise, labels),  # type: ignore[misc]
                given.repeats, device,
            )  # fmt: skip
        share = slowest / spent
        rows.append({"way": name, "seconds": spent, "share": share})
        verdict = "reached" if share < GOAL else "missed"
        print(
            f"{name:26} {given.images} images {spent:7.3f} s {given.images / spent:8.1f} images/s; "
            f"merge {share:6.2%} (goal < {GOAL:.0%}): {verdict}",
            flush=True,
        )
    if given.out:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        document = {
            "device": name, "images": given.images, "steps": given.steps, "merges": found,
            "rollouts": rows, "copy_bytes_per_s": speed,
        }  # fmt: skip
        given.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
