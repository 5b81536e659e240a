"""Images to PNG files, without an imaging library."""

from __future__ import annotations

import math
import os
import struct
import zlib

import torch
from torch import Tensor

from merge_rl.errors import ConfigError
from merge_rl.storage.atomic import atomic_path


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
    if image.ndim != 3 or image.shape[0] not in (1, 3) or image.dtype != torch.uint8:
        raise ConfigError(
            f"expected an image (1 or 3, H, W) uint8, got {tuple(image.shape)} {image.dtype}"
        )
    channels, height, width = image.shape
    rows = image.permute(1, 2, 0).reshape(height, width * channels).contiguous().numpy()
    # Every line starts with its filter type; 0 is none.
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b"")]
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*c) for c in chunks))


def _chunk(kind: bytes, body: bytes) -> bytes:
    check = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)
