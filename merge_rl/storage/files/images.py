"""Single images: decoded from bytes, tiled, enlarged, written. Decoding goes through Pillow."""

from __future__ import annotations

import functools
import io
import math
import os
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merge_rl.errors import ConfigError, ImageError
from merge_rl.storage.files.atomic import atomic_path
from merge_rl.untrusted import pointer_problem, reason

if TYPE_CHECKING:
    from PIL import Image

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
    except UnidentifiedImageError:  # whose own text is the address of a buffer
        if problem := pointer_problem(data):
            raise ImageError(f"{name}: {problem}") from None
        formats = ", ".join(known_formats())
        raise ImageError(f"{name} is broken: no image, expected one of {formats}") from None
    except Exception as error:  # noqa: BLE001 (decoders raise what they like on broken data)
        raise ImageError(f"{name} is broken: {reason(error)}") from None
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _as_rgb_or_grey(image: Image.Image, name: str) -> Image.Image:
    if image.mode in ("RGB", "L"):
        return image
    opaque = image.mode == "P" and "transparency" not in image.info
    if opaque and image.palette is not None and image.palette.mode == "RGB":
        return image.convert("RGB")
    what = "P with transparency" if image.mode == "P" else image.mode
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
    from PIL import Image

    if image.ndim != 3 or image.shape[0] not in (1, 3) or image.dtype != torch.uint8:
        raise ConfigError(
            f"expected an image (1 or 3, H, W) uint8, got {tuple(image.shape)} {image.dtype}"
        )
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(pixels[:, :, 0] if len(image) == 1 else pixels).save(temporary, "PNG")
