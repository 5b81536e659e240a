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
from torch import Tensor

from merge_rl.core.state_dicts import load_exactly
from merge_rl.features.extractor import ImageFeatures, Preparation
from merge_rl.features.inception_network import Inception
from merge_rl.features.resize import resize_bicubic, resize_bilinear, resize_tf1

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
