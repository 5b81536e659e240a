"""How fast images are read, and whether a reference is bound by its extractor.

Writes noise images as PNG files, a zip of them and a .npz; times reading alone, then the whole
pipeline with an extractor. Prints a table and, with `--out`, writes the same numbers as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merge_rl.features.inception import Inception, load_inception
from merge_rl.interfaces import FeatureExtractor
from merge_rl.storage.files.image_source import WORKERS, ImageStream, open_images
from merge_rl.storage.files.images import write_png
from merge_rl.workflows.reference.build import build_reference


class Mean:
    """A cheap extractor: what is left is the pipeline's own time."""

    name, dim = "mean", 48

    def __call__(self, images: Tensor) -> Tensor:
        """The mean colours of a 4 x 4 grid, (B, 48)."""
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)


def random_inception() -> FeatureExtractor:
    """Inception with random weights: the time does not depend on them."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.rand(tensor.shape, generator=generator) * 0.05 + 0.01
        for name, tensor in Inception().state_dict().items()
    }
    return load_inception(weights)


def write_images(folder: Path, count: int, size: int) -> list[Path]:
    """Smooth noise, which PNG compresses about as well as photographs."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, size // 8, size // 8, generator=generator) * 255
    images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    images = (images + 4 * torch.randn(images.shape, generator=generator)).clamp(0, 255).byte()
    for i, image in enumerate(images):
        write_png(folder / f"png/{i}.png", image)
    with zipfile.ZipFile(folder / "png.zip", "w") as archive:
        for i in range(count):
            archive.write(folder / f"png/{i}.png", f"{i}.png")
    np.savez(folder / "images.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    return [folder / "png", folder / "png.zip", folder / "images.npz"]


def reading_rate(path: Path, batch: int) -> float:
    """Images a second, read and decoded alone."""
    start, source = time.perf_counter(), open_images(path)
    with ImageStream(source) as stream:
        for _ in stream.batches(range(len(source)), batch):
            pass
    return len(source) / (time.perf_counter() - start)


def extracting_rate(extractor: FeatureExtractor, count: int, size: int, args: Any) -> float:
    """Images a second of the extractor alone, on images in memory."""
    images = torch.randint(0, 256, (args.batch, 3, size, size), dtype=torch.uint8)
    done, start = 0, time.perf_counter()
    with torch.no_grad():
        while done < count:
            extractor(images[: count - done].to(args.device)).cpu()
            done += min(args.batch, count - done)
    return done / (time.perf_counter() - start)


def building_rate(path: Path, extractor: FeatureExtractor, count: int, args: Any) -> float:
    """Images a second of the whole: read, extract, moments, file."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        build_reference(
            path, Path(folder, "r.safetensors"), extractor=extractor, batch=args.batch,
            device=args.device, limit=count,
        )  # fmt: skip
    return count / (time.perf_counter() - start)


def measure(args: Any) -> list[dict[str, Any]]:
    """A row for each kind of source."""
    extractor = random_inception()
    if isinstance(extractor, torch.nn.Module):
        extractor.to(args.device)
    few = min(args.count, args.inception_images)
    alone = extracting_rate(extractor, few, args.size, args)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for path in write_images(Path(folder), args.count, args.size):
            rows.append(
                {
                    "source": path.name,
                    "size": args.size,
                    "workers": WORKERS,
                    "read_per_s": reading_rate(path, args.batch),
                    "cheap_reference_per_s": building_rate(path, Mean(), args.count, args),
                    "inception_alone_per_s": alone,
                    "inception_reference_per_s": building_rate(path, extractor, few, args),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--inception-images", type=int, default=64)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = measure(args)
    print(f"{args.size} x {args.size}, {os.cpu_count()} cores, images a second")
    names = [name for name in rows[0] if name.endswith("per_s")]
    print(f"{'source':<12}" + "".join(f"{name.removesuffix('_per_s'):>22}" for name in names))
    for row in rows:
        print(f"{row['source']:<12}" + "".join(f"{row[name]:>22.1f}" for name in names))
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
