"""Images as one array of a .npz or .safetensors file, read row by row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from merge_rl.errors import ImageError
from merge_rl.storage.npz import npz_arrays, read_array, read_rows
from merge_rl.storage.safetensors_file import read_one
from merge_rl.storage.safetensors_header import read_header

IMAGE_KEYS: Final = ("images", "arr_0")  # arr_0: what ADM's sampling scripts write
LABEL_KEYS: Final = ("labels", "label", "arr_1")


class ImageArray:
    """Images (N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W), uint8, of one array of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._npz = path.suffix.lower() == ".npz"
        if self._npz:
            arrays = {
                name: (info.shape, str(info.dtype)) for name, info in npz_arrays(path).items()
            }
        else:
            self._header = read_header(path)
            arrays = {
                name: (info.shape, str(info.dtype).removeprefix("torch."))
                for name, info in self._header.tensors.items()
            }
        self.key = next((key for key in IMAGE_KEYS if key in arrays), "")
        if not self.key:
            raise ImageError(
                f"{path}: expected images as {' or '.join(map(repr, IMAGE_KEYS))}, "
                f"found {', '.join(map(repr, arrays)) or 'nothing'}"
            )
        self.shape, dtype = arrays[self.key]
        self._channels_last = _channels_last(self.shape)
        if dtype != "uint8" or self._channels_last is None or 0 in self.shape:
            raise ImageError(
                f"{path}: expected {self.key!r} as images (N, H, W, 3) or (N, 3, H, W) of type "
                f"uint8, found {self.shape} of type {dtype}"
            )
        self.labels = self._read_labels({name: shape for name, (shape, _) in arrays.items()})

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
        for image in self._rows(rows):
            if image.ndim == 2:
                yield image[:, :, None]
            else:
                yield image if self._channels_last else image.transpose(1, 2, 0)

    def _rows(self, rows: Sequence[int]) -> Iterator[npt.NDArray[np.uint8]]:
        if self._npz:
            yield from read_rows(self.path, self.key, rows)
        else:
            begin = self._header.begins[self.key]
            stored = np.memmap(self.path, np.uint8, "r", begin, self.shape)
            for row in rows:
                yield stored[row]

    def _read_labels(self, shapes: dict[str, tuple[int, ...]]) -> Tensor | None:
        fitting = [key for key in LABEL_KEYS if shapes.get(key) == (len(self),)]
        if not fitting:
            return None
        if self._npz:
            values = read_array(self.path, fitting[0])
            return torch.from_numpy(values.astype(np.int64)) if values.dtype.kind in "iu" else None
        tensor = read_one(self.path, self._header, fitting[0])
        return None if tensor.is_floating_point() or tensor.is_complex() else tensor.long()


def _channels_last(shape: tuple[int, ...]) -> bool | None:
    """Where the channels are; None if these cannot be images. Last wins where both would do."""
    if len(shape) == 3:
        return True
    if len(shape) != 4 or not {1, 3} & {shape[1], shape[3]}:
        return None
    return shape[3] in (1, 3)
