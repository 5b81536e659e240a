"""Make the embedded digits runs: train an EDM2 and a SiT on handwritten digits, keep their paths.

    python -m benchmarks.make_digits [--out merge_rl/data/digits] [--only evaluation|edm2|sit]

Data: the 1,797 8x8 digits that scikit-learn ships (UCI "Optical Recognition of Handwritten
Digits"). The networks are trained on 1,197 of them; 60 of every class they never see. The reference
statistics, which a search optimises against, come from one half of every class of all digits, the
held-out statistics, which no search sees, from the other half. The extractor is trained on all.

    edm2/{raw,ema-0.050,ema-0.100}/digits-*.safetensors   8 snapshots along the training, each
                                                          raw and as two power-function EMAs
    sit/raw/digits-*.safetensors                          8 snapshots along the training
    sit/ema/digits-*.safetensors                          the EMA at every second of them
    {edm2,sit}/checkpoints_manifest.yaml                  what they are, with hashes
    evaluation/extractor.safetensors                      64-feature network, trained on the digits
    evaluation/{reference,heldout}.safetensors            feature statistics of the two halves

The recipes are in digits_edm2.py (about 15 minutes on two cores) and digits_sit.py (about 4 minutes
on one core). One seed fixes everything on one kind of machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import digits_edm2, digits_sit
from benchmarks.digits_data import load_images, split_in_halves, training_rows
from merge_rl.core.distances.statistics import feature_stats
from merge_rl.features.digits import DigitsNet
from merge_rl.storage.files.atomic import save_tensors
from merge_rl.storage.files.documents import sha256_file
from merge_rl.workflows.reference.file import save_reference

PARTS = ("evaluation", "edm2", "sit")


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to one pixel: the only augmentation of the extractor's training."""
    padded = F.pad(images.float(), (1, 1, 1, 1))
    offsets = torch.randint(0, 3, (len(images), 2), generator=generator).tolist()
    side = images.shape[-1]
    crops = [padded[i, :, y : y + side, x : x + side] for i, (y, x) in enumerate(offsets)]
    return torch.stack(crops).to(torch.uint8)


def train_extractor(images: Tensor, labels: Tensor, steps: int = 1500) -> DigitsNet:
    """Features from which a linear map tells the class, and another redraws the image.

    The class alone would let features collapse to ten points, blind to how a digit is drawn.
    """
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    side = images.shape[-1]
    net = DigitsNet(side)
    classify, redraw = nn.Linear(64, 10), nn.Linear(64, side * side)
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
    fit_whitening(net, images)
    return net.eval()


def fit_whitening(net: DigitsNet, images: Tensor, ridge: float = 0.01) -> None:
    """Set centre and whitening to (S + ridge tr(S)/D I)^(-1/2) of the images' features."""
    with torch.no_grad():
        pooled = net.pooled(images).double()
        values, vectors = torch.linalg.eigh(torch.cov(pooled.T))
        scale = (values + ridge * values.mean()).rsqrt()
        net.centre.copy_(pooled.mean(0))
        net.whitening.copy_((vectors * scale) @ vectors.T)


def write_evaluation(
    images: Tensor, labels: Tensor, folder: Path, source: str, *, keep_features: bool = False
) -> None:
    """Train the extractor; write it and the statistics, and features, of both halves."""
    net = train_extractor(images, labels)
    weights = {name: tensor.detach() for name, tensor in net.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "extractor.safetensors", weights, {"extractor": "digits"})
    digest = sha256_file(folder / "extractor.safetensors")
    for name, rows in split_in_halves(labels).items():
        features = net(images[rows]).detach()
        save_reference(
            folder / f"{name}.safetensors",
            feature_stats(features),
            extractor="digits",
            extractor_sha256=digest,
            resolution=images.shape[-1],
            source=f"{source}, {name} half of {len(labels):,}",
            features=features if keep_features else None,
            labels=labels[rows] if keep_features else None,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("merge_rl/data/digits"))
    parser.add_argument("--only", choices=PARTS)
    arguments = parser.parse_args()
    out, parts = arguments.out, [arguments.only] if arguments.only else PARTS
    images, labels = load_images()
    rows = training_rows(labels)
    if "evaluation" in parts:
        write_evaluation(images, labels, out / "evaluation", "UCI handwritten digits")
    if "edm2" in parts:
        digits_edm2.train(images[rows], labels[rows], out / "edm2")
    if "sit" in parts:
        digits_sit.train(images[rows], labels[rows], out / "sit")


if __name__ == "__main__":
    main()
