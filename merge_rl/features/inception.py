"""Features for FID: one Inception-v3, prepared for as three public implementations do.

    inception        pytorch-fid: bilinear between pixel centres, 2 x / 255 - 1
    inception-tf1    the original graph, torch-fidelity and EDM2: TensorFlow 1's bilinear,
                     (x - 128) / 128
    inception-clean  clean-fid: antialiased bicubic, clipped to 0..255, (x - 128) / 128

FID is defined by Heusel et al., 2017 (arXiv:1706.08500). Distances between features of different
preparations mean nothing: statistics are compared by these names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from merge_rl.core.network import Undrawn, load_exactly
from merge_rl.features.preparation import (
    ImageFeatures,
    Preparation,
    resize_bicubic,
    resize_bilinear,
    resize_tf1,
)

SIZE: Final = 299
CHUNK: Final = 32  # activations of one image take up to 15 MB


def load_inception(weights: Mapping[str, Tensor], *, tap: str = "2048") -> ImageFeatures:
    """FID features as pytorch-fid computes them."""
    return _build(weights, "inception", prepare_pytorch_fid, tap)


def load_inception_tf1(weights: Mapping[str, Tensor], *, tap: str = "2048") -> ImageFeatures:
    """FID features as the original graph, torch-fidelity and EDM2 compute them."""
    return _build(weights, "inception-tf1", prepare_tf1, tap)


def load_inception_clean(weights: Mapping[str, Tensor], *, tap: str = "2048") -> ImageFeatures:
    """FID features as clean-fid computes them (Parmar et al., 2022, arXiv:2104.11222)."""
    return _build(weights, "inception-clean", prepare_clean, tap)


def prepare_pytorch_fid(images: Tensor) -> Tensor:
    """Images on 0..255 -> (B, C, 299, 299) in [-1, 1]."""
    return 2 * resize_bilinear(images / 255, SIZE) - 1


def prepare_tf1(images: Tensor) -> Tensor:
    """Images on 0..255 -> (B, C, 299, 299) in [-1, 127/128]."""
    return (resize_tf1(images, SIZE) - 128) / 128


def prepare_clean(images: Tensor) -> Tensor:
    """Images on 0..255 -> (B, C, 299, 299) in [-1, 127/128]."""
    return (resize_bicubic(images, SIZE).clamp(0, 255) - 128) / 128


def _build(
    weights: Mapping[str, Tensor], name: str, prepare: Preparation, tap: str
) -> ImageFeatures:
    with Undrawn():
        network = Inception(tap)
    load_exactly(
        network,
        weights,
        f"extractor {name!r}",
        # Public files differ in these; neither enters a feature.
        optional=lambda key: key.endswith("num_batches_tracked"),
        ignored=lambda key: key.startswith("AuxLogits."),
    )
    # Channels last is half as fast again on the CPU, and differs in the last bits.
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.eval().requires_grad_(False)
    name = name if tap == "2048" else f"{name}-{tap}"
    return ImageFeatures(network, prepare, name=name, dim=int(tap), chunk=CHUNK)


DIM: Final = 2048
NUM_CLASSES: Final = 1008
TAPS: Final = ("64", "192", "768", "2048")


class ConvBlock(nn.Module):
    """Convolution without bias, batch norm by running statistics, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Activations (B, C_in, H, W) to (B, C_out, H', W'), at least 0."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _row(inputs: int, outputs: int, length: int) -> ConvBlock:
    return ConvBlock(inputs, outputs, (1, length), padding=(0, length // 2))


def _column(inputs: int, outputs: int, length: int) -> ConvBlock:
    return ConvBlock(inputs, outputs, (length, 1), padding=(length // 2, 0))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


class BlockA(nn.Module):
    """35 x 35: branches of 1x1, 5x5, two 3x3, and an average pool."""

    def __init__(self, inputs: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = ConvBlock(inputs, 64, 1)
        self.branch5x5_1 = ConvBlock(inputs, 48, 1)
        self.branch5x5_2 = ConvBlock(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvBlock(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvBlock(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvBlock(96, 96, 3, padding=1)
        self.branch_pool = ConvBlock(inputs, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five, pooled = self.branch5x5_2(self.branch5x5_1(x)), self.branch_pool(_average(x))
        return torch.cat([self.branch1x1(x), five, double, pooled], 1)


class BlockB(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = ConvBlock(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvBlock(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvBlock(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvBlock(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, _halve(x)], 1)


class BlockC(nn.Module):
    """17 x 17: 7x7 as rows and columns, once and twice, of inner width `width`."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.branch1x1 = ConvBlock(inputs, 192, 1)
        self.branch7x7_1 = ConvBlock(inputs, width, 1)
        self.branch7x7_2 = _row(width, width, 7)
        self.branch7x7_3 = _column(width, 192, 7)
        self.branch7x7dbl_1 = ConvBlock(inputs, width, 1)
        self.branch7x7dbl_2 = _column(width, width, 7)
        self.branch7x7dbl_3 = _row(width, width, 7)
        self.branch7x7dbl_4 = _column(width, width, 7)
        self.branch7x7dbl_5 = _row(width, 192, 7)
        self.branch_pool = ConvBlock(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], 1)


class BlockD(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = ConvBlock(inputs, 192, 1)
        self.branch3x3_2 = ConvBlock(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvBlock(inputs, 192, 1)
        self.branch7x7x3_2 = _row(192, 192, 7)
        self.branch7x7x3_3 = _column(192, 192, 7)
        self.branch7x7x3_4 = ConvBlock(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        three = self.branch3x3_2(self.branch3x3_1(x))
        return torch.cat([three, self.branch7x7x3_4(seven), _halve(x)], 1)


class BlockE(nn.Module):
    """8 x 8: branches that end in a row and a column side by side."""

    def __init__(self, inputs: int, *, max_pool: bool) -> None:
        super().__init__()
        self.pool = _maximum if max_pool else _average
        self.branch1x1 = ConvBlock(inputs, 320, 1)
        self.branch3x3_1 = ConvBlock(inputs, 384, 1)
        self.branch3x3_2a = _row(384, 384, 3)
        self.branch3x3_2b = _column(384, 384, 3)
        self.branch3x3dbl_1 = ConvBlock(inputs, 448, 1)
        self.branch3x3dbl_2 = ConvBlock(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _row(384, 384, 3)
        self.branch3x3dbl_3b = _column(384, 384, 3)
        self.branch_pool = ConvBlock(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        ends = [self.branch3x3_2a(single), self.branch3x3_2b(single)]
        ends += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *ends, self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """The network: prepared images (B, 3, 299, 299) -> pooled features (B, n) at a tap.

    Taps "64", "192", "768" and "2048" are called by their width; the last is FID's. `fc` holds the
    classifier of the public weights, which FID does not use.
    """

    def __init__(self, tap: str = "2048") -> None:
        super().__init__()
        if tap not in TAPS:
            raise ValueError(f"expected a tap of {', '.join(TAPS)}, got {tap!r}")
        self.tap = tap
        self.Conv2d_1a_3x3 = ConvBlock(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBlock(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvBlock(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvBlock(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBlock(80, 192, 3)
        self.Mixed_5b = BlockA(192, pool=32)
        self.Mixed_5c = BlockA(256, pool=64)
        self.Mixed_5d = BlockA(288, pool=64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, width=128)
        self.Mixed_6c = BlockC(768, width=160)
        self.Mixed_6d = BlockC(768, width=160)
        self.Mixed_6e = BlockC(768, width=192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, max_pool=False)
        self.Mixed_7c = BlockE(2048, max_pool=True)
        self.fc = nn.Linear(DIM, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self._map(x).mean((2, 3))

    def _map(self, x: Tensor) -> Tensor:
        x = _halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        if self.tap == "64":
            return x
        x = _halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        if self.tap == "192":
            return x
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        if self.tap == "768":
            return x
        last: Tensor = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return last
