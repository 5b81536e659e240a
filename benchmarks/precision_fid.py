"""What reduced precision does to FID, on the embedded digits runs.

The same checkpoint, the same seeds: FID of float32 with its 95 % interval, then of bfloat16 (and
on an accelerator of TF32, and of the compiled network). The change must lie inside the interval.
Prints a table and, with `--out`, writes the same numbers as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import merge_rl as mrl
from merge_rl.config.sampler import SamplerConfig
from merge_rl.demo import write_demo
from merge_rl.workflows.assembly.defaults import find_defaults


def variants(device: str) -> dict[str, dict[str, Any]]:
    """What is compared with float32, by name."""
    found: dict[str, dict[str, Any]] = {"bfloat16": {"precision": "bfloat16"}}
    if device != "cpu":
        found["tf32"] = {"precision": "tf32"}
        found["fast"] = {"precision": "bfloat16", "compile": True}
    return found


def newest(folder: Path) -> Path:
    """The last raw checkpoint of a run, by name."""
    return max(folder.glob("raw/*.safetensors"))


def measure(model: Path, num_images: int, repeats: int, device: str) -> list[dict[str, Any]]:
    near = find_defaults(model)
    base = near.sampler or SamplerConfig()
    assert near.reference is not None
    rows: list[dict[str, Any]] = []
    for name, changes in {"float32": {}, **variants(device)}.items():
        document = mrl.evaluate(
            mrl.load_model(model), reference=near.reference, extractor=near.extractor,
            extractor_weights=near.extractor_weights, num_images=num_images, repeats=repeats,
            sampler=dataclasses.replace(base, **changes), device=device,
        )  # fmt: skip
        score = document["fid"]["reference"]
        first = rows[0] if rows else score
        rows.append(
            {
                "precision": name,
                "mean": score["mean"],
                "low": score["low"],
                "high": score["high"],
                "change": score["mean"] - first["mean"],
                "inside": first["low"] <= score["mean"] <= first["high"],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--model", type=Path, help="[default: the newest of both embedded runs]")
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        models = {"model": options.model}
        if options.model is None:
            write_demo(Path(folder))
            models = {name: newest(Path(folder) / name) for name in ("edm2", "sit")}
        for name, model in models.items():
            found[name] = measure(model, options.num_images, options.repeats, options.device)
            for row in found[name]:
                print(
                    f"{name:5} {row['precision']:10} FID {row['mean']:.4f} [{row['low']:.4f}, "
                    f"{row['high']:.4f}] change {row['change']:+.4f} inside {row['inside']}",
                    flush=True,
                )
    if options.out is not None:
        document = {"device": options.device, "torch": torch.__version__, "rows": found}
        options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
