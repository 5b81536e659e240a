"""Image files in a folder or a zip: found, named in natural order, decoded one by one.

A zip is read in place and never unpacked. Decoding goes through Pillow.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merge_rl.errors import ConfigError, ImageError
from merge_rl.storage.files.atomic import atomic_path
from merge_rl.storage.files.naming import natural_key
from merge_rl.untrusted import load_json_mapping, pointer_problem

SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP")
LABELS_NAME: Final = "dataset.json"
MAX_FILE_BYTES: Final = 256 * 2**20
MAX_PIXELS: Final = 2**26  # 8192 x 8192

Pixels = npt.NDArray[np.uint8]
"""One image, (H, W, 1 or 3)."""


@dataclass(frozen=True)
class _File:
    name: str  # relative, with "/"
    stamp: str  # changes when the file does
    place: Path | zipfile.ZipInfo


class ImageFiles:
    """The images of a folder, with its subfolders, or of a zip, in natural order of their names.

    Labels come from a `dataset.json` on top ({"labels": [["a/b.png", 3], ...]}), where there is
    one with a whole number for every image.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive = None if path.is_dir() else _open_zip(path)
        files = _listing(self._archive) if self._archive else _walk(path)
        self._files = sorted(
            (file for file in files if is_image_name(file.name)),
            key=lambda file: natural_key(file.name),
        )
        if not self._files:
            raise ImageError(f"{path}: expected images ({', '.join(SUFFIXES)}), found none")
        self.labels = self._read_labels(files)

    def __len__(self) -> int:
        return len(self._files)

    def name(self, row: int) -> str:
        """Name of an image, for messages."""
        return self._files[row].name

    @property
    def fingerprint(self) -> str:
        """SHA-256 of names, sizes and times, or in a zip check sums: other images, other value."""
        lines = [f"{file.name}\n{file.stamp}\n" for file in self._files]
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

    def decode(self, row: int) -> Pixels:
        """An image (H, W, 1 or 3); ImageError, naming it, where it cannot be read."""
        return decode_image(self._bytes(self._files[row]), self._files[row].name)

    def _bytes(self, file: _File, limit: int = MAX_FILE_BYTES) -> bytes:
        try:
            if isinstance(file.place, Path):
                with file.place.open("rb") as stream:
                    data = stream.read(limit + 1)
            else:
                assert self._archive is not None
                with self._archive.open(file.place) as member:
                    data = member.read(limit + 1)
        # A zip member that is damaged, encrypted or packed in a way unknown here.
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, ValueError) as error:
            raise ImageError(f"{file.name}: cannot be read: {_reason(error)}") from None
        if len(data) > limit:
            raise ImageError(f"{file.name}: larger than {limit} bytes, the most that is read")
        return data

    def _read_labels(self, files: Sequence[_File]) -> Tensor | None:
        found = next((file for file in files if file.name == LABELS_NAME), None)
        if found is None:
            return None
        where = f"{self.path}, {LABELS_NAME}"
        try:
            text = self._bytes(found).decode("utf-8")
        except UnicodeDecodeError:
            raise ImageError(f"{where}: not UTF-8 text") from None
        pairs = load_json_mapping(text, where).get("labels")
        if not pairs:
            return None
        try:
            labels = {str(name): value for name, value in pairs}
        except (TypeError, ValueError):
            raise ImageError(f"{where}: expected labels as a list of [name, label]") from None
        return self._order_labels(labels, where)

    def _order_labels(self, labels: dict[str, Any], where: str) -> Tensor | None:
        lacking = [file.name for file in self._files if file.name not in labels]
        if lacking:
            raise ImageError(f"{where}: {lacking[0]} and {len(lacking) - 1} more have no label")
        values = [labels[file.name] for file in self._files]
        if not all(type(value) is int and 0 <= value < 2**31 for value in values):
            return None  # conditions of another kind, such as vectors
        return torch.tensor(values)


def decode_image(data: bytes, name: str) -> Pixels:
    """Pixels of an encoded RGB or grey image; ImageError names what is broken or of another kind.

    Nothing is converted: transparency, palettes and CMYK have no single meaning as RGB.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(
                    f"{name} is {width}x{height}, at most {MAX_PIXELS} pixels are read"
                )
            if image.mode not in ("RGB", "L"):
                raise ImageError(f"{name} is of mode {image.mode}, expected RGB or grey (L)")
            pixels = np.asarray(image)
    except ImageError:
        raise
    except UnidentifiedImageError:  # whose own text is the address of a buffer
        if problem := pointer_problem(data):
            raise ImageError(f"{name}: {problem}") from None
        formats = ", ".join(FORMATS)
        raise ImageError(f"{name} is broken: no image, expected one of {formats}") from None
    except Exception as error:  # noqa: BLE001 (decoders raise what they like on broken data)
        raise ImageError(f"{name} is broken: {_reason(error)}") from None
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def is_image_name(name: str) -> bool:
    """Whether a relative name is that of an image, and not hidden or an archiver's own."""
    parts = name.split("/")
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and name.lower().endswith(SUFFIXES)


def _walk(folder: Path) -> list[_File]:
    def refuse(error: OSError) -> None:
        raise ImageError(f"{error.filename}: cannot be read: {_reason(error)}")

    files = []
    for here, inner, names in os.walk(folder, onerror=refuse):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in names:
            place = Path(here, name)
            relative = place.relative_to(folder).as_posix()
            if not is_image_name(relative) and relative != LABELS_NAME:
                continue
            try:
                status = place.stat()
            except OSError as error:
                raise ImageError(f"{place}: cannot be read: {_reason(error)}") from None
            files.append(_File(relative, f"{status.st_size} {status.st_mtime_ns}", place))
    return files


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ImageError(f"{path}: not a readable zip file: {_reason(error)}") from None


def _listing(archive: zipfile.ZipFile) -> list[_File]:
    return [
        _File(member.filename, f"{member.file_size} {member.CRC:08x}", member)
        for member in archive.infolist()
        if not member.is_dir()
    ]


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__


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
