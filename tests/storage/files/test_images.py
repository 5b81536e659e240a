"""PNG files, and grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from merge_rl.errors import ConfigError
from merge_rl.storage.files.images import enlarge, image_grid, write_png


def read_png(path: Path) -> Tensor:
    """Pixels (C, H, W) of a PNG, grey or RGB as they are stored."""
    with Image.open(path, formats=["PNG"]) as image:
        assert image.mode in ("L", "RGB")
        pixels = torch.tensor(np.asarray(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("shape", [(1, 5, 3), (3, 4, 7), (3, 1, 1), (1, 1, 300)])
def test_png_round_trip(shape: tuple[int, ...], tmp_path: Path) -> None:
    image = draw(*shape)
    write_png(tmp_path / "new/a.png", image)
    assert torch.equal(read_png(tmp_path / "new/a.png"), image)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_views_of_any_layout_are_written(tmp_path: Path) -> None:
    image = draw(8, 6, 3).permute(2, 0, 1)[:, ::2, 1:]
    write_png(tmp_path / "a.png", image)
    assert torch.equal(read_png(tmp_path / "a.png"), image)


@pytest.mark.parametrize(
    "image",
    [draw(2, 4, 4), draw(4, 4), torch.zeros(3, 4, 4)],
)
def test_images_refused(image: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected an image \(1 or 3, H, W\) uint8, got"):
        write_png(tmp_path / "a.png", image)
    assert not list(tmp_path.iterdir())


def test_grid_by_hand() -> None:
    # Three images of 1 x 2 pixels, two columns, one pixel of grey around each.
    images = torch.tensor([[[[1, 2]]], [[[3, 4]]], [[[5, 6]]]], dtype=torch.uint8)
    g = 128
    expected = [
        [g, g, g, g, g, g, g],
        [g, 1, 2, g, 3, 4, g],
        [g, g, g, g, g, g, g],
        [g, 5, 6, g, g, g, g],
        [g, g, g, g, g, g, g],
    ]
    grid = image_grid(images, columns=2)
    assert grid.dtype == torch.uint8
    assert grid.tolist() == [expected]


@pytest.mark.parametrize(
    ("count", "columns", "rows", "across"),
    [
        (1, None, 1, 1),
        (4, None, 2, 2),
        (5, None, 2, 3),
        (10, None, 3, 4),
        (5, 5, 1, 5),
        (5, 1, 5, 1),
    ],
)
def test_grid_layout(count: int, columns: int | None, rows: int, across: int) -> None:
    images = draw(count, 3, 4, 5)
    grid = image_grid(images, columns, padding=2)
    assert grid.shape == (3, rows * 6 + 2, across * 7 + 2)
    for i, image in enumerate(images):
        top, left = 2 + 6 * (i // across), 2 + 7 * (i % across)
        assert torch.equal(grid[:, top : top + 4, left : left + 5], image)


def test_grid_without_padding() -> None:
    images = draw(4, 1, 2, 3)
    top, bottom = torch.cat([*images[:2]], dim=2), torch.cat([*images[2:]], dim=2)
    assert torch.equal(image_grid(images, padding=0), torch.cat([top, bottom], dim=1))


@pytest.mark.parametrize("images", [torch.zeros(0, 1, 2, 2), torch.zeros(1, 2, 2), draw(2, 2)])
def test_grids_refused(images: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"expected images \(N, C, H, W\) uint8, got"):
        image_grid(images)
    with pytest.raises(ConfigError, match=r"expected images"):
        image_grid(torch.zeros(2, 1, 2, 2))


def test_enlarge() -> None:
    image = torch.tensor([[[1, 2], [3, 4]]], dtype=torch.uint8)
    expected = [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    assert enlarge(image, 2).tolist() == [expected]
    assert torch.equal(enlarge(image, 1), image)
