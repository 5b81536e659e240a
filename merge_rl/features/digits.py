"""The 64-feature extractor of the embedded digits run: a small convolutional network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merge_rl.core.state_dicts import load_exactly

NUM_FEATURES = 64
NUM_CLASSES = 10


class DigitsNet(nn.Module):
    """Three 3x3 convolutions with ReLU, the spatial mean of the last one, and a fixed whitening.

    uint8 images (B, 1, 8, 8) -> features (B, 64) float32. Whitening gives every direction that
    digits vary in the same say in a distance: without it a handful of directions, those that tell
    classes apart, hold nearly all variance, and a distance is mostly their sampling noise.
    """

    name = "digits"
    dim = NUM_FEATURES
    centre: Tensor
    whitening: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(1, 24, 3, padding=1)
        self.conv1 = nn.Conv2d(24, 48, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(48, NUM_FEATURES, 3, padding=1)
        self.register_buffer("centre", torch.zeros(NUM_FEATURES))
        self.register_buffer("whitening", torch.eye(NUM_FEATURES))

    def pooled(self, images: Tensor) -> Tensor:
        """Features before whitening, all >= 0: what heads are trained on."""
        x = images.float() / 127.5 - 1  # bytes, or whole numbers with a gradient
        for layer in (self.conv0, self.conv1, self.conv2):
            x = F.relu(layer(x))
        return x.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 64) of images (B, 1, 8, 8) uint8: pooled, centred, whitened."""
        return (self.pooled(images) - self.centre) @ self.whitening


def load_digits_extractor(weights: Mapping[str, Tensor]) -> DigitsNet:
    """The extractor with the given weights, in evaluation mode."""
    net = DigitsNet()
    load_exactly(net, weights, f"extractor {net.name!r}")
    return net.eval().requires_grad_(False)
