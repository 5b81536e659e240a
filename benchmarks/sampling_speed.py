"""Sampling through `sample`, against a plain eager loop over the same network, in one run.

Both make the same images from the same noise; they take turns, so that whatever else the machine
does hits both. With `--workers` ours is the rollout of a search on a CPU, that many batches side by
side, and the plain loop has the threads inside its operations (`--threads 2 --workers 2`). Prints
images/s, network calls an image (nfe) and the ratio of times, and with `--out` writes the same
numbers as JSON. On the CPU: EDM2 of the digits' size and EDM2-XS, SiT-S/2; on an accelerator
SiT-XL/2 too, and with `--fast` the compiled bfloat16 rollouts beside them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from merge_rl.config.sampler import SamplerConfig
from merge_rl.core.sampling.compatibility import count_network_calls, prediction_of
from merge_rl.core.sampling.edm import edm_noise_levels
from merge_rl.core.sampling.sampler import sample_with
from merge_rl.models.edm2 import EDM2
from merge_rl.models.sit import SiT
from merge_rl.workflows.rollout.execution import matmul_precision
from merge_rl.workflows.rollout.graphs import CALLS_BEFORE, as_graphs, renew
from merge_rl.workflows.rollout.rollout import Rollout

Loop: TypeAlias = Callable[[], Tensor]


def answering(network: EDM2) -> EDM2:
    """The same, whose answers are not all 0, as those of a new network are."""
    torch.nn.init.constant_(network.unet.out_gain, 1.0)
    return network


def digits_edm2() -> EDM2:
    """A network of the size of the embedded digits run's."""
    return answering(EDM2(
        img_resolution=8, img_channels=1, label_dim=10, use_fp16=False, model_channels=12,
        channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], channels_per_head=12,
        logvar_channels=16,
    ))  # fmt: skip


def sit_small() -> SiT:
    """SiT-S/2 at 256 x 256 (latents of 32 x 32)."""
    return SiT(hidden_size=384, depth=12, num_heads=6)


def edm2_xs() -> EDM2:
    """EDM2-XS at 512 x 512 (latents of 64 x 64), in float16 on a GPU."""
    return answering(EDM2(img_resolution=64, img_channels=4, label_dim=1000, model_channels=128))


def plain_edm_heun(model: EDM2, noise: Tensor, labels: Tensor, num_steps: int) -> Loop:
    """Heun over noise levels, written out."""
    sigmas = edm_noise_levels(num_steps).to(noise.device)

    @torch.no_grad()
    def run() -> Tensor:
        x = noise * sigmas[0]
        for i in range(num_steps):
            sigma, ahead = sigmas[i], sigmas[i + 1]
            slope = (x - model(x, sigma, labels)) / sigma
            stepped = x + (ahead - sigma) * slope
            if i < num_steps - 1:
                second = (stepped - model(stepped, ahead, labels)) / ahead
                stepped = x + (ahead - sigma) * (slope + second) / 2
            x = stepped
        return x

    return run


def plain_path_heun(model: SiT, noise: Tensor, labels: Tensor, num_steps: int) -> Loop:
    """Heun over times, written out."""
    h = 1 / num_steps
    times = torch.linspace(0, 1, num_steps + 1, device=noise.device)

    @torch.no_grad()
    def run() -> Tensor:
        x = noise
        for t, ahead in itertools.pairwise(times):
            slope = model(x, t, labels)
            x = x + h * (slope + model(x + h * slope, ahead, labels)) / 2
        return x

    return run


def plain_path_guided(model: SiT, noise: Tensor, labels: Tensor, num_steps: int) -> Loop:
    """Euler with guidance of strength 1.5 on three channels, written out."""
    h = 1 / num_steps
    times = torch.linspace(0, 1, num_steps + 1, device=noise.device)
    both = torch.cat([labels, torch.full_like(labels, 1000)])

    @torch.no_grad()
    def run() -> Tensor:
        x = noise
        for t in times[:-1]:
            with_class, without = model(torch.cat([x, x]), t, both).chunk(2)
            mixed = without + 1.5 * (with_class - without)
            x = x + h * torch.cat([mixed[:, :3], with_class[:, 3:]], dim=1)
        return x

    return run


def clock(call: Loop, device: torch.device) -> float:
    """Wall-clock seconds of a call, with everything it left on the device."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


class AsTheyAre:
    """Samples for images."""

    def decode(self, latents: Tensor) -> Tensor:
        """(B, ...) -> the same."""
        return latents


def in_batches(
    model: Any, settings: SamplerConfig, plain: Any, noise: Tensor, labels: Tensor, batch: int,
    workers: int,
) -> tuple[Loop, Loop]:  # fmt: skip
    """The plain loop over batches, and a rollout with so many of them side by side."""
    parts = list(zip(torch.split(noise, batch), torch.split(labels, batch), strict=True))
    loops = [plain(model, *part, settings.num_steps) for part in parts]
    rollout = Rollout(
        model, model.sample_shape, sampler=settings, batch=batch, workers=workers,
        autoencoder=AsTheyAre(), extractor=AsTheyAre(),  # type: ignore[arg-type]
    )  # fmt: skip
    return lambda: torch.cat([loop() for loop in loops]), lambda: rollout.images(noise, labels)


def compare(
    name: str, model: Any, settings: SamplerConfig, plain: Loop, noise: Tensor, labels: Tensor,
    repeats: int, side_by_side: Loop | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Times of both, by turns; the images must be the same unless precision differs."""
    network = as_graphs(model, settings, noise.device, print)

    def alone() -> Tensor:
        renew(network)
        return sample_with(settings, network, noise, labels)

    ours = side_by_side or alone
    reference, made = plain(), ours()
    for _ in range(0, CALLS_BEFORE if noise.device.type == "cuda" else 0, settings.num_steps):
        made = ours()  # until its calls are graphs
    difference = float((made - reference).abs().max() / reference.abs().max())
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for repeat in range(repeats):
        turns = [("ours", ours), ("plain", plain)]
        for key, call in turns if repeat % 2 else reversed(turns):
            times[key].append(clock(call, noise.device))
    ratios = [a / b for a, b in zip(times["ours"], times["plain"], strict=True)]
    calls = count_network_calls(
        settings.solver, settings.num_steps, prediction=prediction_of(model)
    )
    return {
        "name": name,
        "batch": len(noise),
        "nfe": calls * (2 if settings.guidance != 1 else 1),
        "images_per_s": len(noise) / statistics.median(times["ours"]),
        "plain_images_per_s": len(noise) / statistics.median(times["plain"]),
        "time_ratio": statistics.median(ratios),
        "time_ratio_range": [min(ratios), max(ratios)],
        "difference": difference,
        "precision": settings.precision,
        "compiled": settings.compile,
    }


def cases(
    device: torch.device, scale: int, steps: int, fast: bool
) -> list[tuple[str, Any, SamplerConfig, Any, int]]:
    """(name, network, settings, plain loop, batch)."""
    heun, guided = SamplerConfig(num_steps=steps), SamplerConfig(
        solver="euler", num_steps=steps, guidance=1.5
    )  # fmt: skip
    found: list[tuple[str, Any, SamplerConfig, Any, int]] = [
        ("edm2-digits heun", digits_edm2(), heun, plain_edm_heun, 250 * scale)
    ]
    networks = [("sit-s/2", sit_small())]
    quick = [SamplerConfig(num_steps=steps, precision="bfloat16", compile=True)] if fast else []
    xs = edm2_xs()
    if device.type == "cpu":
        found.append(("edm2-xs heun", xs, heun, plain_edm_heun, scale))
    else:
        networks.append(("sit-xl/2", SiT()))
        found += [
            (f"edm2-xs {name}", xs, settings, plain_edm_heun, 2 * scale)
            for name, settings in [("heun", heun), *(("fast", chosen) for chosen in quick)]
        ]
    for name, network in networks:
        found.append((f"{name} heun", network, heun, plain_path_heun, 2 * scale))
        found.append((f"{name} guided", network, guided, plain_path_guided, 2 * scale))
        found += [(f"{name} fast", network, chosen, plain_path_heun, 2 * scale) for chosen in quick]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--scale", type=int, default=1, help="multiplies the batch sizes")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="batches side by side, on a CPU")
    parser.add_argument("--fast", action="store_true", help="bfloat16, compiled (accelerators)")
    parser.add_argument("--only", default="", help="part of the names to measure")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    rows = []
    print(f"{'':18} {'nfe':>4} {'images/s':>9} {'plain':>9} {'time ratio':>10} {'difference':>10}")
    for name, model, settings, plain, batch in cases(
        device, options.scale, options.steps, options.fast
    ):
        if options.only not in name:
            continue
        model.eval().requires_grad_(False).to(device)
        count = batch * (2 * options.workers if options.workers > 1 else 1)
        noise = torch.randn(count, *model.sample_shape, device=device)
        labels = (torch.arange(count) % model.label_dim).to(device)
        loop, beside = plain(model, noise, labels, settings.num_steps), None
        if options.workers > 1:
            loop, beside = in_batches(model, settings, plain, noise, labels, batch, options.workers)
        with matmul_precision(settings):
            row = compare(name, model, settings, loop, noise, labels, options.repeats, beside)
        rows.append(row)
        print(
            f"{name:18} {row['nfe']:4} {row['images_per_s']:9.2f} {row['plain_images_per_s']:9.2f} "
            f"{row['time_ratio']:10.3f} {row['difference']:10.1e}",
            flush=True,
        )
    if options.out is not None:
        document = {"device": str(device), "threads": options.threads, "rows": rows}
        options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
