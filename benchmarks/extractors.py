"""Images a second of the feature extractors and of the latent decoder, with random weights.

Prints a small table and, with `--out`, writes the same numbers as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_rl.features.dinov2 import VIT_L14, load_dinov2
from merge_rl.features.inception import (
    Inception,
    load_inception,
    load_inception_clean,
    load_inception_tf1,
)
from merge_rl.models.autoencoder import SD_VAE, load_edm2_vae

Work = Callable[[int], object]
"""Does its work on that many images."""


def random_like(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Small random weights, variances near 1."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.ones_like(tensor)
        if name.endswith("running_var") or not tensor.is_floating_point()
        else 0.02 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in state.items()
    }


def inception_work(load: Callable[..., Any], size: int, device: str) -> Work:
    extractor = load(random_like(Inception().state_dict())).to(device)
    return lambda count: extractor(torch.zeros(count, 3, size, size, dtype=torch.uint8)).cpu()


def dinov2_work(size: int, device: str) -> Work:
    from transformers import Dinov2Config, Dinov2Model

    state = Dinov2Model(Dinov2Config(**VIT_L14, image_size=518)).state_dict()
    extractor = load_dinov2(random_like(state)).to(device)
    return lambda count: extractor(torch.zeros(count, 3, size, size, dtype=torch.uint8)).cpu()


def decoder_work(size: int, dtype: str, device: str) -> Work:
    from diffusers import AutoencoderKL

    weights = random_like(AutoencoderKL(**SD_VAE).state_dict())
    decoder = load_edm2_vae(weights, dtype=dtype).to(device)
    return lambda count: decoder.decode(torch.zeros(count, 4, size // 8, size // 8)).cpu()


def rate(work: Work, count: int, repeats: int) -> float:
    """Images a second: the best of some repeats, after one image to warm up."""
    work(1)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work(count)
        best = min(best, time.perf_counter() - start)
    return count / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--size", type=int, default=256, help="of the images")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="inception", help="prefix of the names to measure")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size, device = options.size, options.device
    loaders = {
        "inception": load_inception,
        "inception-tf1": load_inception_tf1,
        "inception-clean": load_inception_clean,
    }
    makers: dict[str, Callable[[], Work]] = {
        name: lambda load=load: inception_work(load, size, device)  # type: ignore[misc]
        for name, load in loaders.items()
    }
    makers["dinov2"] = lambda: dinov2_work(size, device)
    for dtype in ("float32", "bfloat16"):
        makers[f"sd-vae-{dtype}"] = lambda dtype=dtype: decoder_work(size, dtype, device)  # type: ignore[misc]
    result: dict[str, Any] = {"size": size, "threads": options.threads, "device": device}
    for name, make in makers.items():
        if name.startswith(options.only):
            found = rate(make(), options.images, options.repeats)
            result[name] = found
            print(f"{name:16} {found:8.2f} images/s", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
