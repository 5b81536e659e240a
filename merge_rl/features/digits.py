"""The 64-feature extractor of the embedded digits runs: a small convolutional network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merge_rl.core.network import load_exactly

NUM_FEATURES = 64
NUM_CLASSES = 10


class DigitsNet(nn.Module):
    """Three 3x3 convolutions with ReLU, 64 numbers made of the last one, and a fixed whitening.

    uint8 images (B, 1, side, side) -> features (B, 64) float32. Of 8x8 digits the numbers are the
    last convolution's spatial means; of 28x28 digits, whose shape is more than texture, a linear
    map of all its values, with ReLU. Whitening gives every direction that digits vary in the same
    say in a distance: without it a handful of directions, those that tell classes apart, hold
    nearly all variance, and a distance is mostly their sampling noise.
    """

    name = "digits"
    dim = NUM_FEATURES
    centre: Tensor
    whitening: Tensor

    def __init__(self, side: int = 8) -> None:
        super().__init__()
        self.side, outer = side, 1 if side == 8 else 2
        self.conv0 = nn.Conv2d(1, 24, 3, stride=outer, padding=1)
        self.conv1 = nn.Conv2d(24, 48, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(48, NUM_FEATURES, 3, stride=outer, padding=1)
        self.project = None if side == 8 else nn.Linear(NUM_FEATURES * 4 * 4, NUM_FEATURES)
        self.register_buffer("centre", torch.zeros(NUM_FEATURES))
        self.register_buffer("whitening", torch.eye(NUM_FEATURES))

    def pooled(self, images: Tensor) -> Tensor:
        """Features before whitening, all >= 0: what heads are trained on."""
        x = images.float() / 127.5 - 1  # bytes, or whole numbers with a gradient
        for layer in (self.conv0, self.conv1, self.conv2):
            x = F.relu(layer(x))
        return x.mean((2, 3)) if self.project is None else F.relu(self.project(x.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 64) of images (B, 1, side, side) uint8: pooled, centred, whitened."""
        return (self.pooled(images) - self.centre) @ self.whitening


def load_digits_extractor(weights: Mapping[str, Tensor]) -> DigitsNet:
    """The extractor with the given weights, in evaluation mode; they say for which digits."""
    net = DigitsNet(28 if "project.weight" in weights else 8)
    load_exactly(net, weights, f"extractor {net.name!r}")
    return net.eval().requires_grad_(False)
