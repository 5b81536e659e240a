"""Pictures that are drawn and written: captions, places and kinds, by hand."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from merge_rl.errors import ConfigError, ImageError
from merge_rl.storage.files import images as module
from merge_rl.storage.files.images import (
    decode_image,
    is_image,
    is_image_name,
    picture_address,
    picture_format,
    side_by_side,
    write_picture,
)

INK, PAPER = (22, 25, 29), (255, 255, 255)


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


class Letters:
    """A font of letters that are all ten pixels wide."""

    def getlength(self, text: str) -> int:
        return 10 * len(text)


@pytest.mark.parametrize(
    ("width", "shown"),
    [(60, "abcdef"), (59, "a...f"), (50, "a...f"), (49, "a..."), (10, "..."), (0, "...")],
)
def test_a_line_is_cut_to_the_width_of_its_picture(width: int, shown: str) -> None:
    assert module._cut("abcdef", width, Letters()) == shown


def expected_page(
    size: tuple[int, int], letters: int, texts: list[tuple[int, int, int, str]]
) -> Image.Image:
    """White, with texts (left, top, row, text): the first row in larger letters."""
    page = Image.new("RGB", size, PAPER)
    fonts = module._font(letters), module._font({13: 11, 20: 17, 28: 24}[letters])
    for left, top, row, text in texts:
        ImageDraw.Draw(page).text((left, top), text, fill=INK, font=fonts[row])
    return page


def test_pictures_side_by_side_by_hand() -> None:
    grey, colours = draw(1, 3, 90), draw(3, 5, 60)
    shown = side_by_side([("One\nof two\nthree", grey), ("Two", colours)])
    # 14 pixels around each, three lines of 1.45 x 13 = 18.85 pixels, 7 more beneath them.
    top, size = 14 + 57 + 7, (14 + 90 + 14 + 60 + 14, 14 + 57 + 7 + 5 + 14)
    page = expected_page(
        size, 13, [(14, 14, 0, "One"), (14, 33, 1, "of two"), (14, 52, 1, "three"),
                   (118, 14, 0, "Two")],
    )  # fmt: skip
    expected = torch.from_numpy(np.array(page)).permute(2, 0, 1).clone()
    expected[:, top : top + 3, 14:104] = grey
    expected[:, top : top + 5, 118:178] = colours
    assert torch.equal(shown, expected)


@pytest.mark.parametrize(
    ("height", "letters", "top"),
    [
        (22 * 20, 20, 14 + 29 + 7),  # a line of 29 pixels
        (22 * 30, 28, 14 + 41 + 7),  # of 40.6
        (22 * 14 - 1, 13, 14 + 19 + 7),  # of 18.85
    ],
)
def test_letters_grow_with_pictures(height: int, letters: int, top: int) -> None:
    picture = torch.zeros(1, height, 40, dtype=torch.uint8)
    shown = side_by_side([("a", picture)])
    page = expected_page((68, top + height + 14), letters, [(14, 14, 0, "a")])
    expected = torch.from_numpy(np.array(page)).permute(2, 0, 1).clone()
    expected[:, top : top + height, 14:54] = 0
    assert torch.equal(shown, expected)


def address(pixels: np.ndarray, most: int = 1000) -> tuple[str, Image.Image]:
    """Kind and picture of an address."""
    head, _, data = picture_address(pixels, most).partition(";base64,")
    return head, Image.open(io.BytesIO(base64.b64decode(data)))


def test_small_and_grey_pictures_are_kept_bit_by_bit() -> None:
    for shape in ((64, 64, 3), (32, 128, 3), (70, 70, 1)):
        pixels = draw(*shape).numpy()
        kind, picture = address(pixels)
        assert kind == "data:image/png"
        assert len(picture.getbands()) == shape[2]
        assert np.array_equal(np.asarray(picture).reshape(shape), pixels)


def test_photographs_are_jpegs_of_bounded_size() -> None:
    pixels = draw(65, 64, 3).numpy()
    kind, picture = address(pixels)
    assert (kind, picture.size) == ("data:image/jpeg", (64, 65))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=88)
    assert np.array_equal(np.asarray(picture), np.asarray(Image.open(file)))
    assert address(pixels, 13)[1].size == (13, 13)
    assert address(draw(100, 50, 1).numpy(), 10)[1].size == (5, 10)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.png", "PNG"), ("a.JPEG", "JPEG"), ("a.jfif", "JPEG"), ("a.webp", "WEBP"),
        ("a.bmp", "BMP"), ("a.gif", "GIF"), ("a.tif", "TIFF"),
    ],
)  # fmt: skip
def test_names_say_the_kind(name: str, kind: str, tmp_path: Path) -> None:
    assert picture_format(name) == kind
    for channels in (1, 3):
        image = draw(channels, 6, 5)
        write_picture(tmp_path / name, image)
        with Image.open(tmp_path / name, formats=[kind]) as picture:
            assert picture.size == (5, 6)
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
        if kind not in ("JPEG", "GIF"):  # which lose something
            assert torch.equal(pixels, image.expand(3, -1, -1))


@pytest.mark.parametrize("name", ["a", "a.txt", "a.avif", "png"])
def test_other_names_are_refused(name: str) -> None:
    known = r"\.png, \.jpg, \.webp, \.bmp, \.gif, \.tif$"
    with pytest.raises(
        ConfigError, match=f"^{name}: expected the name of a picture, end.* {known}"
    ):
        picture_format(name)


def test_names_of_images() -> None:
    names = {"a.png": True, "A.JPG": True, ".a.png": False, "a.txt": False, "png": False}
    assert {name: is_image_name(name) for name in names} == names


def test_content_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("L", (9, 9)).save(file, "PNG")
    assert is_image(file)
    assert not is_image(io.BytesIO(b"text"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9)  # Pillow refuses twice as many
    file.seek(0)
    assert is_image(file)  # and what there is too much of is said when it is decoded
    with pytest.raises(ImageError, match="^a is broken: Image size .81 pixels. exceeds limit"):
        decode_image(file.getvalue(), "a")


def test_a_pointer_to_an_image_is_called_so() -> None:
    content = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1234\n"
    with pytest.raises(ImageError, match="^a: a Git LFS pointer to a file of 1,234 bytes"):
        decode_image(content, "a")


def test_an_old_pillow_has_letters_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFont

    known = ImageFont.load_default

    def old(*size: Any) -> Any:
        if size:
            raise TypeError
        return known()

    monkeypatch.setattr(ImageFont, "load_default", old)
    assert module._font(20).getlength("a") == known().getlength("a")
