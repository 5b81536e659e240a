"""Single images: decoded from bytes, tiled, enlarged, written. Decoding goes through Pillow."""

from __future__ import annotations

import base64
import functools
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from merge_rl.config import whole_number
from merge_rl.errors import ConfigError, ImageError
from merge_rl.late import torch
from merge_rl.storage.files.atomic import atomic_path
from merge_rl.untrusted import describe, pointer_problem, reason

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

MAX_LABEL: Final = 2**31 - 1


class Labels(NamedTuple):
    """Labels (N,) int64; None where there are none that can be used, with what is wrong if any."""

    values: Tensor | None = None
    problem: str = ""


def parse_labels(values: Iterable[object], name: Callable[[int], str]) -> Labels:
    """Labels from numbers or text (3, 3.0, "3"); `name` says whose label a position is."""
    found = []
    for position, value in enumerate(values):
        label = _whole(value)
        if label is None:
            shown = describe(value)
            return Labels(
                problem=f"the label of {name(position)} is {shown}, expected a whole number from 0 "
                f"to {MAX_LABEL}"
            )
        found.append(label)
    return Labels(torch.tensor(found, dtype=torch.int64))


def _whole(value: object) -> int | None:
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    found = whole_number(value)  # true and false are none
    return found if found is not None and 0 <= found <= MAX_LABEL else None


FORMATS: Final[Mapping[str, tuple[str, ...]]] = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm"),
    "JPEG2000": (".jp2",),
    "AVIF": (".avif",),
}
"""What is read, as far as the installed Pillow does, and usual endings. All are decoded in this
process; Pillow would start other programs for some of the rest."""
SUFFIXES: Final = tuple(suffix for usual in FORMATS.values() for suffix in usual)
MAX_PIXELS: Final = 2**26  # 8192 x 8192
_MANY_FRAMES: Final = ("PNG", "WEBP", "GIF", "TIFF", "AVIF")  # a JPEG may hold a preview

Pixels = npt.NDArray[np.uint8]
"""One image, (H, W, 1 or 3)."""


@functools.cache
def known_formats() -> tuple[str, ...]:
    """Those of FORMATS that the installed Pillow reads."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def is_image_name(name: str) -> bool:
    """Whether a file, by its name alone, is an image that is not hidden."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def is_image(stream: IO[bytes]) -> bool:
    """Whether the content, not the name, is that of an image; only its header is read."""
    from PIL import Image

    try:
        with Image.open(stream, formats=known_formats()):
            return True
    except Image.DecompressionBombError:
        return True  # and refused when it is decoded
    except Exception:  # noqa: BLE001 (readers raise what they like on other data)
        return False


def other_image(suffix: str) -> bool:
    """Whether Pillow knows an ending as that of a picture which is not among FORMATS."""
    from PIL import Image

    return Image.registered_extensions().get(suffix) in Image.OPEN.keys() - FORMATS.keys()


def decode_image(data: bytes, name: str) -> Pixels:
    """Pixels of an encoded RGB or grey image; ImageError names what is broken or of another kind.

    An opaque palette is looked up. Nothing else is converted: transparency and CMYK have no single
    meaning as RGB, and several frames are no single image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=known_formats()) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(
                    f"{name} is {width}x{height}, at most {MAX_PIXELS} pixels are read"
                )
            frames = getattr(image, "n_frames", 1) if image.format in _MANY_FRAMES else 1
            if frames > 1:
                raise ImageError(f"{name} has {frames} frames, expected a single image")
            pixels = np.asarray(_as_rgb_or_grey(image, name))
    except ImageError:
        raise
    except UnidentifiedImageError:  # whose message has only the address of a buffer
        if problem := pointer_problem(data):
            raise ImageError(f"{name}: {problem}") from None
        formats = ", ".join(known_formats())
        raise ImageError(f"{name} is broken: no image, expected one of {formats}") from None
    except Exception as error:  # noqa: BLE001 (decoders raise what they like on broken data)
        raise ImageError(f"{name} is broken: {reason(error)}") from None
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _as_rgb_or_grey(image: Image.Image, name: str) -> Image.Image:
    opaque, plain = "transparency" not in image.info, image.mode in ("RGB", "L")
    deep = plain and ";16" in str(
        getattr(image, "tile", "")
    )  # of which Pillow would drop the lower half
    if plain and opaque and not deep:
        return image
    palette = image.palette if image.mode == "P" else None
    if opaque and palette is not None and palette.mode == "RGB":
        return image.convert("RGB")
    what = image.mode + " with transparency" * (not opaque) + " in 16 bits" * deep
    raise ImageError(f"{name} is of mode {what}, expected RGB or grey (L)")


def image_grid(images: Tensor, columns: int | None = None, padding: int = 1) -> Tensor:
    """Tile images (N, C, H, W) uint8 into one (C, rows * H', columns * W'), row by row.

    The default is the squarest grid. Between tiles lie `padding` pixels of mid grey.
    """
    if images.ndim != 4 or images.dtype != torch.uint8 or len(images) == 0:
        raise ConfigError(
            f"expected images (N, C, H, W) uint8, got {tuple(images.shape)} {images.dtype}"
        )
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    tall, wide = height + padding, width + padding
    grid = torch.full((channels, rows * tall + padding, columns * wide + padding), 128)
    grid = grid.to(torch.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * tall + padding, (i % columns) * wide + padding
        grid[:, top : top + height, left : left + width] = image
    return grid


def enlarge(image: Tensor, factor: int) -> Tensor:
    """Repeat every pixel factor x factor times: (C, H, W) -> (C, H f, W f)."""
    return image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def write_png(path: str | os.PathLike[str], image: Tensor) -> None:
    """Write (1 or 3, H, W) uint8 as an 8-bit grey or RGB PNG, atomically."""
    _write(path, image, "PNG")


def write_picture(path: str | os.PathLike[str], image: Tensor) -> None:
    """Write (1 or 3, H, W) uint8 as what the name ends in, see `picture_format`, atomically."""
    _write(path, image, picture_format(path))


WRITTEN: Final = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


def picture_format(path: str | os.PathLike[str]) -> str:
    """The kind of file that a name asks for; ConfigError, with those there are, for others."""
    suffix = Path(path).suffix.lower()
    for name in WRITTEN:
        if suffix in FORMATS[name]:
            return name
    known = ", ".join(FORMATS[name][0] for name in WRITTEN)
    raise ConfigError(f"{path}: expected the name of a picture, ending in {known}")


def _write(path: str | os.PathLike[str], image: Tensor, kind: str) -> None:
    from PIL import Image

    if image.ndim != 3 or image.shape[0] not in (1, 3) or image.dtype != torch.uint8:
        raise ConfigError(
            f"expected an image (1 or 3, H, W) uint8, got {tuple(image.shape)} {image.dtype}"
        )
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels[:, :, 0] if len(image) == 1 else pixels)
    with atomic_path(path) as temporary:  # each kind takes what it knows of the rest
        picture.save(temporary, kind, quality=92, lossless=True)


LOSSLESS: Final = 64 * 64  # pixels, up to which an image in a page is kept bit by bit


def picture_address(pixels: Pixels, most: int) -> str:
    """An image as a data: address, no side longer than `most`; a photograph as a JPEG."""
    from PIL import Image

    height, width, channels = pixels.shape
    small = height * width <= LOSSLESS or channels == 1
    page = Image.fromarray(pixels[:, :, 0] if channels == 1 else np.ascontiguousarray(pixels))
    page.thumbnail((most, most))
    file = io.BytesIO()
    kind = "png" if small else "jpeg"
    page.save(file, kind.upper(), quality=88)  # which a PNG has no use for
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


Panel = tuple[str, "Tensor"]
"""A caption, and the picture (1 or 3, H, W) uint8 beneath it."""
_MARGIN: Final = 14  # pixels around a panel
_INK, _PAPER = (22, 25, 29), (255, 255, 255)


def side_by_side(panels: Sequence[Panel]) -> Tensor:
    """Pictures in a row with their captions above them, (3, H, W) uint8 on white.

    A caption has lines, the first of them in larger letters; the middle of one that is wider than
    its picture is left out.
    """
    from PIL import Image, ImageDraw

    size = max(13, min(28, max(picture.shape[1] for _, picture in panels) // 22))
    fonts = [_font(size), _font(round(0.85 * size))]
    lines = max(len(caption.splitlines()) for caption, _ in panels)
    top = _MARGIN + round(1.45 * size * lines) + _MARGIN // 2
    width = sum(picture.shape[2] for _, picture in panels) + _MARGIN * (len(panels) + 1)
    height = top + max(picture.shape[1] for _, picture in panels) + _MARGIN
    page = Image.new("RGB", (width, height), _PAPER)
    draw, left = ImageDraw.Draw(page), _MARGIN
    for caption, picture in panels:
        pixels = picture.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
        page.paste(Image.fromarray(pixels), (left, top))
        for row, text in enumerate(caption.splitlines()):
            font = fonts[min(row, 1)]
            shown = _cut(text, picture.shape[2], font)
            draw.text((left, _MARGIN + round(1.45 * size * row)), shown, fill=_INK, font=font)
        left += picture.shape[2] + _MARGIN
    return torch.from_numpy(np.array(page)).permute(2, 0, 1)


def _font(size: int) -> Any:
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size)
    except (ImportError, OSError, TypeError):  # a Pillow that has letters of one size alone
        return ImageFont.load_default()


def _cut(text: str, width: int, font: Any) -> str:
    """As much of a line as a width has room for, of both ends: names often differ in the last."""
    kept, shown = len(text), text
    while kept and font.getlength(shown) > width:
        kept -= 1
        shown = f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"
    return shown
