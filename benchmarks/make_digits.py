"""Make the embedded digits run: train a small EDM2 on handwritten digits and keep its trajectory.

    python benchmarks/make_digits.py [--out merge_rl/demo/data]

Data: the 1,797 8x8 digits that scikit-learn ships (UCI "Optical Recognition of Handwritten
Digits"). The network is trained on 1,197 of them; 60 of every class it never sees. The reference
statistics, which a search optimises against, come from one half of every class of all digits, the
held-out statistics, which no search sees, from the other half. The extractor is trained on all.

    edm2/{raw,ema-0.050,ema-0.100}/digits-*.safetensors   8 snapshots along the training, each
                                                          raw and as two power-function EMAs
    edm2/checkpoints_manifest.yaml                        what they are, with hashes
    evaluation/extractor.safetensors                      64-feature network, trained on the digits
    evaluation/{reference,heldout}.safetensors            feature statistics of the two halves

The recipe is that of EDM2 at small scale: the loss with learned uncertainty, Adam (0.9, 0.99), a
learning rate with warm-up and inverse square root decay that starts at 7 % of the training.
About 15 minutes on two cores. One seed fixes everything on one kind of machine.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from merge_rl.core.ema_profiles import ema_beta
from merge_rl.core.statistics import feature_stats
from merge_rl.features.digits import DigitsNet
from merge_rl.models.autoencoder import PixelEncoder
from merge_rl.models.edm2 import EDM2, Block
from merge_rl.models.magnitude import normalize
from merge_rl.registry import build_model
from merge_rl.storage.atomic import save_tensors
from merge_rl.storage.hashing import sha256_file
from merge_rl.storage.manifest import CheckpointEntry, Manifest, SetDefaults, write_manifest
from merge_rl.storage.reference import save_reference

CONFIG = {
    "model": "edm2",
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 10,
    "use_fp16": False,
    "sigma_data": 0.75,  # standard deviation of the digits scaled to [-1, 1]
    "logvar_channels": 16,
    "model_channels": 12,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "channels_per_head": 12,
}
BATCH = 256
SNAPSHOTS = 8
SNAPSHOT_EVERY = 1024 * BATCH  # images
REF_LR, WARMUP_IMAGES = 0.012, 10_000
P_MEAN, P_STD = -0.4, 1.0
EMA_STDS = (0.05, 0.10)
SAMPLER = {"solver": "heun", "num_steps": 8}  # over the official noise levels


def load_images() -> tuple[Tensor, Tensor]:
    """All digits: images uint8 (1797, 1, 8, 8) and labels (1797,) int64."""
    data = load_digits()
    # 17 grey levels 0..16 -> 0..255
    images = torch.from_numpy(np.rint(data.images * (255 / 16)).astype(np.uint8))[:, None]
    return images, torch.from_numpy(data.target.astype(np.int64))


def training_rows(labels: Tensor, seed: int = 0) -> Tensor:
    """Rows the network is trained on: all but 60 of every class."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.ones(len(labels), dtype=torch.bool)
    for digit in range(10):
        rows = (labels == digit).nonzero().flatten()
        kept[rows[torch.randperm(len(rows), generator=generator)[:60]]] = False
    return kept.nonzero().flatten()


def split_in_halves(labels: Tensor, seed: int = 1) -> dict[str, Tensor]:
    """Rows of the two halves; each has half of every class, give or take one."""
    generator = torch.Generator().manual_seed(seed)
    halves: dict[str, list[Tensor]] = {"reference": [], "heldout": []}
    for digit in range(10):
        rows = (labels == digit).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        middle = (len(rows) + digit % 2) // 2
        halves["reference"].append(rows[:middle])
        halves["heldout"].append(rows[middle:])
    return {name: torch.cat(parts).sort().values for name, parts in halves.items()}


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to one pixel: the only augmentation of the extractor's training."""
    padded = F.pad(images.float(), (1, 1, 1, 1))
    offsets = torch.randint(0, 3, (len(images), 2), generator=generator).tolist()
    crops = [padded[i, :, y : y + 8, x : x + 8] for i, (y, x) in enumerate(offsets)]
    return torch.stack(crops).to(torch.uint8)


def train_extractor(images: Tensor, labels: Tensor, steps: int = 1500) -> DigitsNet:
    """Features from which a linear map tells the class, and another redraws the image.

    The class alone would let features collapse to ten points, blind to how a digit is drawn.
    """
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    net = DigitsNet()
    classify, redraw = nn.Linear(64, 10), nn.Linear(64, 64)
    parameters = [*net.parameters(), *classify.parameters(), *redraw.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(labels), (128,), generator=generator)
        moved = shifted(images[rows], generator)
        features = net.pooled(moved)
        loss = F.cross_entropy(classify(features), labels[rows])
        loss = loss + 4 * F.mse_loss(redraw(features), moved.flatten(1) / 127.5 - 1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    accuracy = float((classify(net.pooled(images)).argmax(1) == labels).float().mean())
    print(f"extractor: accuracy {accuracy:.4f}", flush=True)
    net.fit_whitening(images)
    return net.eval()


def edm2_loss(model: EDM2, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Mean of lambda(sigma) / exp(u) |D - y|^2 + u (Karras et al., 2024, equation 14)."""
    normal = torch.randn(len(images), 1, 1, 1, generator=generator)
    sigma = (normal * P_STD + P_MEAN).exp()
    weight = (sigma**2 + model.sigma_data**2) / (sigma * model.sigma_data) ** 2
    noise = torch.randn(images.shape, generator=generator) * sigma
    denoised = model(images + noise, sigma.flatten(), labels)
    u = model.logvar(sigma.flatten())
    loss: Tensor = (weight / u.exp() * (denoised - images).square() + u).mean()
    return loss


def learning_rate(nimg: int) -> float:
    """Warm-up, then inverse square root decay from 7 % of the training on."""
    decay_from = 0.07 * SNAPSHOTS * SNAPSHOT_EVERY
    return REF_LR * min(nimg / WARMUP_IMAGES, 1) / math.sqrt(max(nimg / decay_from, 1))


def plain_attention(self: Block, qkv: Tensor) -> Tensor:
    """The block's attention without the layout of fused kernels.

    Training multiplies every rounding into another trajectory. The committed files were made with
    this kernel; with it they can be made again, whatever kernel the package picks for speed.
    """
    batch, channels, height, width = qkv.shape
    qkv = qkv.reshape(batch, self.num_heads, -1, 3, height * width)
    q, k, v = normalize(qkv, dims=(2,)).unbind(3)
    out = F.scaled_dot_product_attention(q.mT, k.mT, v.mT)
    return out.mT.reshape(batch, channels // 3, height, width)


def half(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float16 copies, as published snapshots are stored."""
    return {name: tensor.detach().half().clone() for name, tensor in weights.items()}


class Trajectory:
    """Keeps the power-function EMAs up to date and writes snapshots."""

    def __init__(self, model: EDM2, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.emas = {std: [p.detach().clone() for p in model.parameters()] for std in EMA_STDS}
        self.entries: list[CheckpointEntry] = []

    def update(self, nimg: int) -> None:
        for std, ema in self.emas.items():
            beta = ema_beta(std, nimg, BATCH)
            torch._foreach_lerp_(ema, list(self.model.parameters()), 1 - beta)

    def save(self, nimg: int) -> None:
        raw = self.model.state_dict()
        self._write("raw", nimg, None, half(raw))
        names = [name for name, _ in self.model.named_parameters()]
        for std, ema in self.emas.items():
            averaged = {**raw, **dict(zip(names, ema, strict=True))}
            self._write(f"ema-{std:.3f}", nimg, std, half(averaged))

    def _write(self, track: str, nimg: int, std: float | None, weights: dict[str, Tensor]) -> None:
        suffix = "" if std is None else f"-{std:.3f}"
        file = f"{track}/digits-{nimg // 1000:07d}{suffix}.safetensors"
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, weights, {})
        self.entries.append(
            CheckpointEntry(
                file=file, nimg=nimg, ema_std=std, track=track, sha256=sha256_file(path)
            )
        )


def train(images: Tensor, labels: Tensor, folder: Path) -> list[CheckpointEntry]:
    """Train from scratch and write the snapshots; returns their manifest entries."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = build_model(CONFIG).train()
    Block._attention = plain_attention  # type: ignore[method-assign]
    latents = PixelEncoder().encode(images)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    trajectory, began, running = Trajectory(model, folder), time.time(), 0.0
    for nimg in range(BATCH, SNAPSHOTS * SNAPSHOT_EVERY + 1, BATCH):
        rows = torch.randint(len(labels), (BATCH,), generator=generator)
        loss = edm2_loss(model, latents[rows], labels[rows], generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(nimg)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        trajectory.update(nimg)
        running = 0.99 * running + 0.01 * float(loss.detach())
        if nimg % SNAPSHOT_EVERY == 0:
            trajectory.save(nimg)
            print(f"{nimg} images, loss {running:.3f}, {time.time() - began:.0f} s", flush=True)
    return trajectory.entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("merge_rl/demo/data"))
    out = parser.parse_args().out
    images, labels = load_images()
    net = train_extractor(images, labels)
    weights = {name: tensor.detach() for name, tensor in net.state_dict().items()}
    (out / "evaluation").mkdir(parents=True, exist_ok=True)
    save_tensors(out / "evaluation/extractor.safetensors", weights, {"extractor": "digits"})
    digest = sha256_file(out / "evaluation/extractor.safetensors")
    for name, rows in split_in_halves(labels).items():
        stats = feature_stats(net(images[rows]).detach())
        save_reference(
            out / f"evaluation/{name}.safetensors",
            stats,
            extractor="digits",
            extractor_sha256=digest,
            resolution=8,
            source=f"UCI handwritten digits, {name} half of 1,797",
        )
    rows = training_rows(labels)
    entries = train(images[rows], labels[rows], out / "edm2")
    write_manifest(
        out / "edm2/checkpoints_manifest.yaml",
        Manifest(
            model=CONFIG,
            name="digits-edm2",
            licence="Apache-2.0",
            defaults=SetDefaults(
                extractor="digits",
                extractor_weights=Path("evaluation/extractor.safetensors"),
                reference=Path("evaluation/reference.safetensors"),
                heldout=Path("evaluation/heldout.safetensors"),
                sampler=SAMPLER,
            ),
            checkpoints=tuple(entries),
        ),
    )


if __name__ == "__main__":
    main()
