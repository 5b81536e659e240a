"""The 64-feature extractor of the embedded digits run: a small convolutional classifier."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

NUM_FEATURES = 64
NUM_CLASSES = 10


class DigitsNet(nn.Module):
    """Three 3x3 convolutions with ReLU; the spatial mean of the last one is the feature vector.

    uint8 images (B, 1, 8, 8) -> features (B, 64) float32, all >= 0. The linear classifier on
    top serves its training alone.
    """

    name = "digits"
    dim = NUM_FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(1, 24, 3, padding=1)
        self.conv1 = nn.Conv2d(24, 48, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(48, NUM_FEATURES, 3, padding=1)
        self.classifier = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = images.float() / 127.5 - 1
        for layer in (self.conv0, self.conv1, self.conv2):
            x = F.relu(layer(x))
        return x.mean((2, 3))


def load_digits_extractor(weights: Mapping[str, Tensor]) -> DigitsNet:
    """The extractor with the given weights, in evaluation mode."""
    net = DigitsNet()
    net.load_state_dict(dict(weights))
    return net.eval().requires_grad_(False)


def classify(net: DigitsNet, images: Tensor) -> Tensor:
    """Class scores (B, 10) of uint8 images (B, 1, 8, 8)."""
    scores: Tensor = net.classifier(net(images))
    return scores
