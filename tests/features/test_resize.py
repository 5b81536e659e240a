"""Resizing against hand calculations, the public implementations' numbers, and Pillow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from merge_rl.features.preparation import (
    resize_bicubic,
    resize_bicubic_bytes,
    resize_bilinear,
    resize_tf1,
)

Resize = Callable[[Tensor, int], Tensor]
ALL = (resize_bilinear, resize_tf1, resize_bicubic, resize_bicubic_bytes)


@pytest.mark.parametrize(
    ("resize", "expected"),
    [
        # Centres: source (i + 1/2) / 2 - 1/2 = -1/4, 1/4, 3/4, 5/4, held at the edges.
        (resize_bilinear, [0.0, 2.5, 7.5, 10.0]),
        # Corners: source i / 2 = 0, 1/2, 1, 3/2, whose right neighbour is the edge.
        (resize_tf1, [0.0, 5.0, 10.0, 10.0]),
    ],
)
def test_two_pixels_become_four(resize: Resize, expected: list[float]) -> None:
    row = torch.tensor([0.0, 10.0]).expand(1, 1, 2, 2)
    along_x = torch.tensor(expected).expand(1, 1, 4, 4)
    torch.testing.assert_close(resize(row, 4), along_x, rtol=0, atol=1e-5)
    torch.testing.assert_close(resize(row.mT, 4), along_x.mT, rtol=0, atol=1e-5)


def test_tf1_reads_a_ramp_at_the_corners() -> None:
    # f(x, y) = 3 x + y is linear, so output (i, j) is 3 i (7 / 5) + j (9 / 5) where neighbours are.
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(7.0), indexing="ij")
    found = resize_tf1((3 * x + y)[None, None], 5)[0, 0]
    i = torch.arange(5.0)
    torch.testing.assert_close(found, 3 * (i * 7 / 5)[None, :] + (i * 9 / 5)[:, None])


@pytest.mark.parametrize("resize", ALL)
def test_an_image_of_the_size_comes_back(resize: Resize, generator: torch.Generator) -> None:
    image = torch.randint(0, 256, (2, 3, 9, 9), generator=generator).float()
    torch.testing.assert_close(resize(image, 9), image, rtol=0, atol=1e-4)


def test_bicubic_overshoots_and_antialiases() -> None:
    step = torch.tensor([0.0, 0.0, 255.0, 255.0]).expand(1, 1, 4, 4)
    large = resize_bicubic(step, 16)
    assert large.min() < -5
    assert large.max() > 260
    # A chequerboard finer than the new pixels becomes its mean, not one of its colours.
    board = ((torch.arange(64)[:, None] + torch.arange(64)) % 2 * 200.0)[None, None]
    inner = resize_bicubic(board, 8)[..., 1:-1, 1:-1]
    torch.testing.assert_close(inner, torch.full_like(inner, 100.0), rtol=0, atol=1.0)


@pytest.mark.parametrize("size", [40, 300])
def test_bytes_are_pillows(size: int) -> None:
    pixels = np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)
    pillow = np.asarray(Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    found = resize_bicubic_bytes(tensor, 224)[0].permute(1, 2, 0).numpy()
    # Pillow computes in fixed point, so that it may round a value at .5 the other way.
    off = np.abs(found - pillow.astype(np.float32))
    assert off.max() <= 2
    assert (off > 0).mean() < 0.01


@pytest.mark.parametrize("images", ["", "big_"])
def test_golden_pixels(images: str, golden: Path) -> None:
    with np.load(golden / "inception/expected.npz") as stored:
        numbers = {key: torch.from_numpy(stored[key]) for key in stored.files}
    at = numbers["resize_sample_positions"]
    given = numbers["big_image" if images else "images"].float()

    def sampled(resized: Tensor) -> Tensor:
        return resized[:, :, at][:, :, :, at]

    found = {
        "resized_tf1_0_255": resize_tf1(given, 299),
        "resized_pytorch_0_1": resize_bilinear(given / 255, 299),
        "resized_clean_fid_0_255": resize_bicubic(given, 299).clamp(0, 255),
    }
    for name, resized in found.items():
        tolerance = 1e-5 if name.endswith("0_1") else 1e-3
        expected = numbers[images + name]
        torch.testing.assert_close(sampled(resized), expected, rtol=0, atol=tolerance)
