"""Images of a folder, a zip or a .npz file, streamed as uniform batches."""

from __future__ import annotations

import functools
import hashlib
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from merge_rl.errors import ImageError, absent
from merge_rl.late import torch
from merge_rl.storage.files.image_files import ImageFiles
from merge_rl.storage.files.npz import ArrayInfo, npz_arrays, npz_labels, read_rows
from merge_rl.untrusted import open_file

if TYPE_CHECKING:
    from torch import Tensor

WORKERS: Final = max(2, min(16, os.cpu_count() or 2))  # decoding threads
MAX_AHEAD: Final = 256  # images decoded before they are asked for


class ImageArray:
    """Images (N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W), uint8, of one array of a .npz."""

    left_out_text = ""

    def __init__(self, path: Path) -> None:
        self.path = path
        arrays = npz_arrays(path)
        self.key = image_key(arrays)
        if not self.key:
            listed = ", ".join(f"{name!r} {info}" for name, info in arrays.items())
            raise ImageError(
                f"{path}: expected images as {' or '.join(map(repr, IMAGE_KEYS))}, or one array "
                f"of images alone, found {listed}"
            )
        info = arrays[self.key]
        self.shape = info.shape
        self._channels_last = _channels_last(self.shape)
        if info.dtype != np.uint8 or self._channels_last is None or 0 in self.shape:
            raise ImageError(
                f"{path}: expected {self.key!r} as images (N, H, W, 3) or (N, 3, H, W), or grey "
                f"with one channel or none, of type uint8, found {info}"
            )
        twins = [k for k, other in arrays.items() if _are_alike(info, other) and k != self.key]
        if twins:
            raise ImageError(
                f"{path}: {self.key!r} {info} and {twins[0]!r} {arrays[twins[0]]} are images both; "
                "expected one array of images"
            )
        if len(self.shape) == 3 and (self.shape[0] == 3 or self.shape[2] in (1, 3)):
            raise ImageError(
                f"{path}: {self.key!r} {self.shape} may be one image or {self.shape[0]} grey ones; "
                "expected four axes: (N, H, W, channels)"
            )
        self.labels, self.label_problem = npz_labels(path, arrays, len(self))

    def __len__(self) -> int:
        return self.shape[0]

    def name(self, row: int) -> str:
        """Name of an image, for messages."""
        return f"{self.path.name}[{row}]"

    @property
    def fingerprint(self) -> str:
        """Hash of name, size and time: another file gives another value."""
        status = self.path.stat()
        text = f"{self.key} {self.shape} {status.st_size} {status.st_mtime_ns}"
        return hashlib.sha256(text.encode()).hexdigest()

    def read(self, rows: Sequence[int]) -> Iterator[npt.NDArray[np.uint8]]:
        """Images (H, W, 1 or 3) of ascending rows."""
        for image in read_rows(self.path, self.key, rows):
            if image.ndim == 2:
                yield image[:, :, None]
            else:
                yield image if self._channels_last else image.transpose(1, 2, 0)


ImageSource = ImageFiles | ImageArray
"""len, name(row), labels (N,) int64 or None and why, fingerprint, what was left out."""


def open_images(path: str | os.PathLike[str]) -> ImageSource:
    """The images at `path`; ImageError if there are none.

    A folder (with subfolders) or a zip of image files, or a `.npz` with "images", "arr_0" or a
    single array of images. Nothing is decoded yet.
    """
    place = Path(path)
    if place.is_dir():
        return ImageFiles(place)
    if not place.exists():
        raise ImageError(absent(place))
    open_file(place, ImageError).close()
    kind = place.suffix.lower()
    if kind == ".zip":
        return ImageFiles(place)
    if kind == ".npz":
        return ImageArray(place)
    raise ImageError(
        f"{place}: expected a folder, a .zip or a .npz of images, found a file with the ending "
        f"{place.suffix!r}"
    )


@dataclass(frozen=True)
class ImageKind:
    """Size and mode that all images of a source share, and the image that set them."""

    name: str
    width: int
    height: int
    channels: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height} {'RGB' if self.channels == 3 else 'grey'}"

    def held_against(self, known: ImageKind | None, path: Path) -> ImageKind:
        """The kind of the images of a source; ImageError where this one is of another."""
        if known is None or str(self) == str(known):
            return known or self
        raise ImageError(
            f"{path}: {self.name} is {self}, expected {known} as {known.name}; images of one size "
            "and mode are needed"
        )


@dataclass
class ImageStream:
    """Reads batches in order; refuses what differs from the first image; counts what is broken.

    Args:
        source: what `open_images` gives.
        skip_broken: leave out images that cannot be read, and count them, instead of refusing.
        kind: what the images must be like; the first one says if None.
    """

    source: ImageSource
    skip_broken: bool = False
    kind: ImageKind | None = None
    broken: list[str] = field(default_factory=list)  # the reasons, one an image
    _pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> ImageStream:
        # Not for `batches` to end by itself: a generator that is dropped is closed whenever garbage
        # is collected, be it in the middle of another pool's submit, whose lock ending one needs.
        self._pool = ThreadPoolExecutor(WORKERS)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def batches(self, rows: Sequence[int], size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows (B,) int64, images (B, 1 or 3, H, W) uint8) for each `size` of the ascending rows.

        A batch lacks the broken images among its rows, down to none at all. Inside a `with` block
        of the stream, the next images are decoded in threads while the caller works on a batch.
        """
        images = self._decoded(rows, min(size, MAX_AHEAD))
        for start in range(0, len(rows), size):
            kept, found = [], []
            for row in rows[start : start + size]:
                image = next(images)
                if isinstance(image, ImageError):
                    self._skip(image)
                else:
                    self._require_kind(row, image)
                    kept.append(row)
                    found.append(image)
            yield torch.tensor(kept, dtype=torch.int64), _stack(found)

    def _decoded(
        self, rows: Sequence[int], ahead: int
    ) -> Iterator[npt.NDArray[np.uint8] | ImageError]:
        if isinstance(self.source, ImageArray):
            yield from self.source.read(rows)
            return
        decode = functools.partial(_start, self.source, self._pool)
        waiting = deque(decode(row) for row in rows[: ahead if self._pool else 1])
        for position in range(len(rows)):
            error = (future := waiting.popleft()).exception()
            if error is not None and not isinstance(error, ImageError):
                raise error
            yield future.result() if error is None else error
            following = position + 1 + len(waiting)
            if following < len(rows):
                waiting.append(decode(rows[following]))

    def _skip(self, error: ImageError) -> None:
        if not self.skip_broken:
            raise error
        self.broken.append(str(error))

    def _require_kind(self, row: int, image: npt.NDArray[np.uint8]) -> None:
        height, width, channels = image.shape
        found = ImageKind(self.source.name(row), width, height, channels)
        self.kind = found.held_against(self.kind, self.source.path)


def _start(
    source: ImageFiles, pool: ThreadPoolExecutor | None, row: int
) -> Future[npt.NDArray[np.uint8]]:
    """Decode an image, in a thread where there is a pool."""
    if pool is not None:
        return pool.submit(source.decode, row)
    done: Future[npt.NDArray[np.uint8]] = Future()
    try:
        done.set_result(source.decode(row))
    except ImageError as error:
        done.set_exception(error)
    return done


def _stack(images: list[npt.NDArray[np.uint8]]) -> Tensor:
    if not images:
        return torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


IMAGE_KEYS: Final = ("images", "arr_0")  # arr_0: what ADM's sampling scripts write


def image_key(arrays: Mapping[str, ArrayInfo]) -> str:
    """The name of the array that holds the images: a usual one, or the only one that can; or ""."""
    usual = next((key for key in IMAGE_KEYS if key in arrays), "")
    alike = [
        key
        for key, info in arrays.items()
        if info.dtype == np.uint8 and _channels_last(info.shape) is not None
    ]
    return usual or (alike[0] if len(alike) == 1 else "")


def _are_alike(images: ArrayInfo, other: ArrayInfo) -> bool:
    """Whether the other array holds images of the same size: half of a set that is in two."""
    same = (images.dtype, images.shape[1:]) == (other.dtype, other.shape[1:])
    return same and len(images.shape) == len(other.shape) == 4


def _channels_last(shape: tuple[int, ...]) -> bool | None:
    """Where the channels are; None if these cannot be images. Last wins where both would do."""
    if len(shape) == 3:
        return True
    if len(shape) != 4 or not {1, 3} & {shape[1], shape[3]}:
        return None
    return shape[3] in (1, 3)
