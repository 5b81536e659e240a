"""Figures of a GPU that no other benchmark takes, one at a time; `benchmarks.gpu` calls them.

    python -m benchmarks.gpu_figures NAME [--device cuda] [--tiny] --out FILE.json

rounds    a round of the digits' searches on the device, and on two CPU cores of the same machine
vae       images a second of Stability's decoder: float32, bfloat16, channels last, compiled; and of
          Inception as it is and compiled
gradient  images a second with a gradient beside plain ones, network alone
pass      coefficients' gradient from that of the weights, against the bytes of the checkpoints
memory    peak of a gradient against that of a rollout without one, 4 and 16 solver steps

Each writes {"rows": [[what, N, measured], ...], "values": {...}}; weights are random.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

import merge_rl as mrl
from benchmarks.merge_share import checkpoints_like, copy_speed, seconds
from merge_rl.config.optimize import OptimizeConfig, RewardConfig, SearchConfig
from merge_rl.config.sampler import SamplerConfig
from merge_rl.core.merging.live_model import LiveModel, coefficient_gradient
from merge_rl.demo import write_demo
from merge_rl.interfaces import NullTracker
from merge_rl.models.autoencoder import Samples
from merge_rl.models.edm2 import EDM2
from merge_rl.models.sit import SiT
from merge_rl.workflows.rollout import (
    DifferentiableRollout,
    Differentiated,
    MergedRollout,
    Rollout,
    WorkItem,
    exact_products,
)
from merge_rl.workflows.rollout.compiled import Compiled, WholeChunks

Figure = dict[str, Any]
WAYS: Final[dict[str, dict[str, Any]]] = {
    "float32": {},
    "bfloat16": {"precision": "bfloat16"},
    "--fast": {"precision": "bfloat16", "compile": True},
}
CPU_THREADS: Final = 2


def figure(rows: list[list[str]], **values: Any) -> Figure:
    return {"rows": rows, "values": values}


# --------------------------------------------------------------------------------------- rounds


class Enough(NullTracker):
    """Ends a run after so many rounds, whose seconds it keeps."""

    def __init__(self, rounds: int) -> None:
        self.rounds, self.seconds = rounds, list[float]()

    def event(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "round":
            self.seconds.append(float(event["seconds"]))
            if len(self.seconds) == self.rounds:
                raise KeyboardInterrupt


def round_seconds(checkpoints: Path, out: Path, searcher: str, device: str, tiny: bool) -> float:
    """Median seconds of a search's rounds after the first, which warms up."""
    pool, subset = (100, 10) if tiny else (1000, 100)
    config = OptimizeConfig(
        checkpoints=str(checkpoints), track="raw", budget=60_000, device=device,
        reward=RewardConfig(pool_size=pool, subset_size=subset, refresh_size=2 * subset),
        search=SearchConfig(name=searcher),
    )  # fmt: skip
    watch = Enough(2 if tiny else 4)
    with suppress(KeyboardInterrupt):
        mrl.optimize(checkpoints, out=out, config=config, tracker=watch)
    return statistics.median(watch.seconds[1:])


def rounds(device: str, tiny: bool) -> Figure:
    """Seconds a round: on the device, on two cores, and their ratio."""
    found, rows = dict[str, dict[str, float]](), list[list[str]]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_demo(folder)
        for family in ("edm2", "sit"):
            for searcher in ("policy-gradient", "pathwise"):
                if tiny and (family, searcher) != ("edm2", "pathwise"):
                    continue
                label, usual = f"{family} {searcher}", torch.get_num_threads()
                out = folder / f"{family}-{searcher}"
                there = round_seconds(folder / family, out, searcher, device, tiny)
                torch.set_num_threads(CPU_THREADS)
                here = round_seconds(
                    folder / family, out.with_name(f"{out.name}-cpu"), searcher, "cpu", tiny
                )
                torch.set_num_threads(usual)
                found[label] = {device: there, "cpu": here}
                text = f"{there:.2f} s, two cores {here:.2f} s: {here / there:.1f}x"
                rows.append([f"a round of the digits, {label}", "median of rounds", text])
                print(label, text, flush=True)
    return figure(rows, seconds=found)


# ----------------------------------------------------------------------------- decoder, features


def rate(work: Callable[[], object], count: int, device: str, repeats: int) -> float:
    """Images a second, the median of some repeats after one that compiles."""
    return count / seconds(work, repeats, torch.device(device))


def vae(device: str, tiny: bool) -> Figure:
    """Images of 256 x 256 a second, decoder by decoder; and Inception's."""
    from diffusers import AutoencoderKL

    from benchmarks.extractors import random_like
    from merge_rl.features.inception import Inception, load_inception
    from merge_rl.models.autoencoder import SD_VAE, load_edm2_vae

    side, count, repeats = (4, 8, 1) if tiny else (32, 96, 3)
    config = dict(SD_VAE)
    if tiny:
        config |= {"block_out_channels": [4] * 4, "layers_per_block": 1, "norm_num_groups": 2}
    weights = random_like(AutoencoderKL(**config).state_dict())
    latents = torch.randn(count, 4, side, side, device=device)
    found: dict[str, float] = {}

    def note(name: str, decode: Callable[[Tensor], Tensor], given: Tensor) -> None:
        with torch.no_grad(), exact_products():
            found[name] = rate(lambda: decode(given), len(given), device, repeats)
        print(f"{name:32} {found[name]:9.1f} images/s", flush=True)

    for dtype in ("float32", "bfloat16"):
        plain = load_edm2_vae(weights, config, dtype=dtype).to(device)
        note(f"VAE {dtype}", plain.levels, latents)
    nn.Module.to(plain.vae, memory_format=torch.channels_last)  # type: ignore[call-overload]
    note("VAE bfloat16, channels last", plain.levels, latents)
    extractor = load_inception(random_like(Inception().state_dict())).to(device)
    images = torch.randint(0, 256, (2 if tiny else 192, 3, 8 * side, 8 * side), device=device)
    images = images.to(torch.uint8)
    note("Inception", extractor, images)
    for chunk in (4,) if tiny else (4, 16):
        plain.chunk = chunk
        torch.compiler.reset()
        fast = Compiled(plain.levels, "decoded images", print, digits=7, dynamic=False)
        note(f"VAE --fast, {chunk} at a time", WholeChunks(fast, chunk), latents)
    if not tiny:
        fast = Compiled(extractor, "features", print, dynamic=False)
        note("Inception, compiled", WholeChunks(fast, extractor.chunk), images)
    text = ", ".join(f"{name.removeprefix('VAE ')} {value:,.0f}" for name, value in found.items())
    return figure([["images of 256 x 256 a second", f"{count}, median of {repeats}", text]],
                  images_per_s=found)  # fmt: skip


# ------------------------------------------------------------------------------------- gradients


class Projected:
    """Features (B, 8) of samples, next to nothing beside a network."""

    name, dim = "projected", 8

    def __call__(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        waves = torch.arange(flat.shape[1] * self.dim, device=flat.device, dtype=flat.dtype)
        made: Tensor = flat @ waves.cos().view(-1, self.dim) / flat.shape[1] ** 0.5
        return made


def network(name: str, device: str, tiny: bool) -> Any:
    """A network of random weights that answers something."""
    with torch.device(device):
        if name == "EDM2-XS":
            sizes: dict[str, Any] = {"img_resolution": 64, "model_channels": 128}
            if tiny:
                sizes = {"img_resolution": 8, "model_channels": 16, "channels_per_head": 16,
                         "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [8]}  # fmt: skip
            made: nn.Module = EDM2(img_channels=4, label_dim=1000, **sizes)
            nn.init.constant_(made.unet.out_gain, 1.0)  # type: ignore[union-attr, arg-type]
        elif tiny:
            made = SiT(input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=3)
        elif name == "SiT-B/2":
            made = SiT(hidden_size=768, depth=12, num_heads=12)
        else:
            made = SiT()
    for weight in made.parameters():  # new networks have layers of zeros
        if not weight.any():
            nn.init.normal_(weight, std=0.02)
    return made.to(device).eval().requires_grad_(False)


def random_rollout(model: Any, sampler: SamplerConfig, batch: int, device: str) -> MergedRollout:
    """A rollout of the merge of two checkpoints near the model's weights, on the device."""
    checkpoints = checkpoints_like(model, 2, torch.float16, torch.device(device))
    state = model.state_dict()
    for row in checkpoints.matrix:
        for name, view in checkpoints.layout.views(row).items():
            view.copy_(state[name])
    rollout = Rollout(
        model, model.sample_shape, sampler=sampler, autoencoder=Samples(), extractor=Projected(),
        batch=batch, device=device,
    )  # fmt: skip
    return MergedRollout(LiveModel(model, checkpoints), rollout)


def both(merged: MergedRollout, count: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Calls that make so many images, without and with a gradient."""
    item = WorkItem(torch.tensor([[0.5, 0.5]]), range(count), torch.arange(count) % 3)
    differentiable: list[DifferentiableRollout] = []

    def with_gradient() -> Differentiated:
        if not differentiable:
            differentiable.append(DifferentiableRollout(merged, announce=print))
        made = differentiable[0](item, torch.ones_like)
        if made.dropped or not made.gradient.isfinite().all():
            raise ArithmeticError(f"no gradient: {made.dropped[:1]}")
        return made

    return lambda: merged.features_of([item]), with_gradient


def gradient(device: str, tiny: bool) -> Figure:
    """Images a second with and without a gradient, 4 Heun steps."""
    found: dict[str, dict[str, float]] = {}
    count, repeats = (4, 1) if tiny else (32, 1)
    for way, changes in WAYS.items():
        for name in ("SiT-XL/2", "EDM2-XS"):
            if device == "cpu" and changes.get("compile"):
                continue
            merged = random_rollout(
                network(name, device, tiny), SamplerConfig(num_steps=4, **changes), count, device
            )
            calls = both(merged, count)
            plain, slow = (rate(call, count, device, repeats) for call in calls)
            found[f"{name} {way}"] = {"plain": plain, "gradient": slow, "ratio": plain / slow}
            print(f"{name} {way}: {plain:.1f}, with a gradient {slow:.1f} images/s", flush=True)
    rows = [
        [f"images a second with a gradient, {name}", f"{count}, one after a warm-up",
         f"{value['gradient']:.1f} beside {value['plain']:.1f}: {value['ratio']:.1f}x the time"]
        for name, value in found.items()
    ]  # fmt: skip
    return figure(rows, images_per_s=found)


def gradient_pass(device: str, tiny: bool) -> Figure:
    """Seconds of the pass over 8 float16 checkpoints, and of reading their bytes once."""
    where, count = torch.device(device), 8
    model = network("SiT-XL/2", device, tiny)
    checkpoints = checkpoints_like(model, count, torch.float16, where)
    weights = torch.randn(checkpoints.layout.size, device=where)
    spent = seconds(lambda: coefficient_gradient(checkpoints, weights), 3, where)
    moved = checkpoints.layout.size * (2 * count + 4)
    floor = moved / copy_speed(where, 3)
    text = f"{1e3 * spent:.1f} ms, floor {1e3 * floor:.1f} ms"
    what = f"gradient of the weights to that of coefficients, {count} float16 checkpoints"
    return figure([[what, "median of 3", text]], seconds=spent, floor=floor, bytes=moved)


def memory(device: str, tiny: bool) -> Figure:
    """Peak bytes of a rollout, and of one with a gradient, SiT-B/2, 32 images."""
    found: dict[str, int] = {}
    for steps in (4, 16):
        merged = random_rollout(
            network("SiT-B/2", device, tiny), SamplerConfig(num_steps=steps), 32, device
        )
        calls = both(merged, 32)
        for name, call in zip(("forward", "gradient"), calls, strict=True):
            call()
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            call()
            found[f"{name} {steps}"] = _peak(device)
        del merged, calls, call
        gc.collect()  # or the next case has this one's network beside its own
    text = ", ".join(f"{name} steps {value / 2**20:,.0f} MiB" for name, value in found.items())
    return figure([["peak memory, SiT-B/2, 32 images", "one run each", text]], bytes=found)


def _peak(device: str) -> int:
    from merge_rl.workflows.finetune.step import peak_memory

    return peak_memory(device)


FIGURES: Final[dict[str, Callable[[str, bool], Figure]]] = {
    "rounds": rounds, "vae": vae, "gradient": gradient, "pass": gradient_pass, "memory": memory,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="One figure of a GPU.")
    parser.add_argument("name", choices=FIGURES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="to try the script")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.manual_seed(0)
    began = time.monotonic()
    found = FIGURES[given.name](given.device, given.tiny)
    found["seconds"] = time.monotonic() - began
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
