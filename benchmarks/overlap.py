"""Decoding and features beside the sampling of the next block: what two streams of a GPU gain.

    python -m benchmarks.overlap [--device cuda] [--images 200] [--batch 50] [--out FILE.json]

SiT-XL/2 (bfloat16, compiled), Stability's VAE in bfloat16 and Inception, all of random weights: the
features of the same images, block after block on one stream, and overlapped as rollouts make them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from benchmarks.extractors import random_like
from merge_rl.config.sampler import SamplerConfig
from merge_rl.features.inception import Inception, load_inception
from merge_rl.models.autoencoder import SD_VAE, load_edm2_vae
from merge_rl.models.sit import SiT
from merge_rl.workflows.rollout.execution import exact_products
from merge_rl.workflows.rollout.rollout import Rollout


def timed(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    torch.cuda.synchronize()
    began = time.perf_counter()
    found = work()
    torch.cuda.synchronize()
    return found, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="Two streams against one.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = given.device
    torch.manual_seed(0)
    with torch.device(device):
        model = SiT().eval().requires_grad_(False)
    vae = load_edm2_vae(random_like(AutoencoderKL(**SD_VAE).state_dict()), dtype="bfloat16")
    rollout = Rollout(
        model, model.sample_shape,
        sampler=SamplerConfig(num_steps=given.steps, precision="bfloat16", compile=True),
        autoencoder=vae.to(device), extractor=load_inception(
            random_like(Inception().state_dict())
        ).to(device),
        batch=given.batch, device=device,
    )  # fmt: skip
    noise, labels = rollout.noise(range(given.images)), torch.arange(given.images)

    def one_stream() -> Tensor:
        parts = []
        with torch.no_grad():
            for x, y in zip(
                torch.split(noise, given.batch), torch.split(labels, given.batch), strict=True
            ):
                latents = rollout.latents(x, y)
                with exact_products():
                    parts.append(rollout.extractor(rollout.autoencoder.decode(latents)).cpu())
        return torch.cat(parts)

    ways = {"one stream": one_stream, "two streams": lambda: rollout.features(noise, labels)}
    found = {name: timed(work)[0] for name, work in ways.items()}  # compiles too
    equal = torch.equal(*found.values())
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.repeats):
        for name, work in ways.items():
            times[name].append(timed(work)[1])
    rates = {name: given.images / statistics.median(spent) for name, spent in times.items()}
    for name, rate in rates.items():
        print(f"{name:12} {rate:8.1f} images/s")
    print(f"gain {rates['two streams'] / rates['one stream']:.3f}x; equal features: {equal}")
    if given.out:
        document = {"images_per_s": rates, "equal": equal, "batch": given.batch}
        given.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
