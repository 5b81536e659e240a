"""NumPy arrays from anywhere (.npz, .npy): headers first, sizes bounded, never a pickle.

An archive is a zip file with one `.npy` member an array. What a header promises is compared with
what is there before memory is taken for it.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from merge_rl.errors import DataFileError
from merge_rl.storage.files.archives import Archive, reading
from merge_rl.storage.files.images import Labels, parse_labels
from merge_rl.untrusted import FREE_BYTES, MAX_EXPANSION, open_file, reason

NUMBERS: Final = "biufc"  # kinds of types
TEXT: Final = "US"
LABEL_KEYS: Final = ("labels", "label", "arr_1")
_MAX_HEADER: Final = 10_000
_MAX_DIRECTORY: Final = 2**20


@dataclass(frozen=True)
class ArrayInfo:
    """Shape and type of a stored array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool = False  # columns first

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.shape} of type {self.dtype}"


def npz_arrays(path: Path) -> dict[str, ArrayInfo]:
    """Name -> shape and type of every array, in the order of the file; only headers are read."""
    found = {}
    with _opened(path) as archive:
        for member in archive.infolist():
            if member.filename.endswith(".npy"):
                name = member.filename[:-4]
                with archive.entry(member) as file:
                    found[name] = _header(file, member.file_size, f"{path}: array {name!r}")
    if not found:
        raise DataFileError(f"{path}: expected a .npz file of arrays, found none in it")
    return found


def read_array(path: Path, name: str, kinds: str = NUMBERS) -> npt.NDArray[Any]:
    """One array, in the machine's own byte order, float64 if it is wider.

    Refused where it is of another kind of type, or would take far more memory than its file has
    bytes.
    """
    with _opened(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        if member.file_size > max(FREE_BYTES, MAX_EXPANSION * member.compress_size):
            raise DataFileError(
                f"{path}: array {name!r} would expand from {member.compress_size} to "
                f"{member.file_size} bytes, at most {MAX_EXPANSION} times are read"
            )
        with archive.entry(member) as file:
            return _read(file, member.file_size, f"{path}: array {name!r}", kinds)


def read_npy(path: Path) -> npt.NDArray[Any]:
    """The array of a .npy file, as `read_array` gives those of an archive."""
    with open_file(path, DataFileError) as file, reading(str(path), DataFileError, ".npy file"):
        return _read(file, os.fstat(file.fileno()).st_size, f"{path}: its array", NUMBERS)


def read_rows(path: Path, name: str, rows: Sequence[int]) -> Iterator[npt.NDArray[Any]]:
    """The rows with these ascending indices, one at a time: memory for one row is enough."""
    with _opened(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        where = f"{path}: array {name!r}"
        with archive.entry(member) as file:
            info = _header(file, member.file_size, where)
            _require_kind(info, where, NUMBERS)
            if info.fortran:
                raise DataFileError(f"{where} is in Fortran order, expected C order")
            size = info.nbytes // max(info.shape[0], 1)
            position = 0
            for row in rows:
                _skip(file, (row - position) * size)
                data = file.read(size)
                if len(data) < size:
                    raise DataFileError(f"{where} ends within row {row}")
                yield _native(np.frombuffer(data, info.dtype).reshape(info.shape[1:]))
                position = row + 1


def npz_labels(path: Path, arrays: dict[str, ArrayInfo], count: int) -> Labels:
    """The labels of `count` rows beside them in the file, under one of the usual names."""
    given = [key for key in LABEL_KEYS if key in arrays]
    fitting = [key for key in given if arrays[key].shape == (count,)]
    if not fitting:
        problem = f"{given[0]!r} is {arrays[given[0]]}, expected ({count},)" if given else ""
        return Labels(problem=problem)
    key = fitting[0]
    if arrays[key].dtype.kind not in NUMBERS + TEXT:
        kind = arrays[key].dtype
        return Labels(problem=f"{key!r} is of type {kind}, expected whole numbers")
    values = read_array(path, key, NUMBERS + TEXT)
    return parse_labels(values.tolist(), lambda row: f"row {row}")


def _read(file: IO[bytes], size: int, where: str, kinds: str) -> npt.NDArray[Any]:
    info = _header(file, size, where)
    _require_kind(info, where, kinds)
    data = bytearray(info.nbytes)
    view, done = memoryview(data), 0
    while done < len(data):
        piece = file.read(min(2**20, len(data) - done))
        if not piece:
            raise DataFileError(f"{where} ends after {done} of {len(data)} bytes")
        view[done : done + len(piece)] = piece
        done += len(piece)
    flat = np.frombuffer(data, info.dtype, count=math.prod(info.shape))
    return _native(flat.reshape(info.shape, order="F" if info.fortran else "C"))


def _native(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Types that tensors have: not the other byte order, nothing wider than 64 bits a number."""
    kind, size = array.dtype.kind, array.dtype.itemsize
    with np.errstate(over="ignore"):  # to infinity, which whoever computes with it refuses
        if kind == "f" and size > 8:
            return array.astype(np.float64)
        if kind == "c" and size > 16:
            return array.astype(np.complex128)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _skip(file: IO[bytes], count: int) -> None:
    while count > 0:
        count -= len(file.read(min(count, 2**20))) or count


def _require_kind(info: ArrayInfo, where: str, kinds: str) -> None:
    if info.dtype.kind not in kinds or info.dtype.itemsize == 0 or info.dtype.subdtype:
        raise DataFileError(
            f"{where} is of type {info.dtype}, expected numbers; "
            "arrays of Python objects are never read"
        )


def _header(file: IO[bytes], size: int, where: str) -> ArrayInfo:
    """Shape and type from the start of a file of `size` bytes, checked against that size."""
    start = file.read(12)
    version = np.lib.format.read_magic(io.BytesIO(start))
    if version not in ((1, 0), (2, 0)):
        raise DataFileError(f"{where} is of version {version}, expected 1 or 2")
    read, width = (
        (np.lib.format.read_array_header_1_0, 2)
        if version == (1, 0)
        else (np.lib.format.read_array_header_2_0, 4)
    )
    length = int.from_bytes(start[8 : 8 + width], "little")
    if length > _MAX_HEADER:
        raise DataFileError(f"{where} has a header of {length} bytes, at most {_MAX_HEADER}")
    begin = 8 + width + length
    text = start[8:] + file.read(max(begin - len(start), 0))
    try:
        shape, fortran, dtype = read(io.BytesIO(text))
    except Exception as error:  # noqa: BLE001 (whatever parses it raises what it likes)
        raise DataFileError(f"{where} has an unreadable header: {reason(error)}") from None
    info = ArrayInfo(tuple(map(int, shape)), dtype, fortran)
    found = size - begin
    if min(info.shape, default=0) < 0 or (not dtype.hasobject and info.nbytes != found):
        raise DataFileError(
            f"{where} of shape {info.shape} and type {dtype} needs {info.nbytes} bytes, "
            f"found {found}"
        )
    return info


@contextmanager
def _opened(path: Path) -> Iterator[Archive]:
    where, what = str(path), ".npz file"
    with (
        Archive(
            lambda: open_file(path, DataFileError), where, DataFileError, what, _MAX_DIRECTORY
        ) as archive,
        reading(where, DataFileError, what),
    ):
        yield archive
