"""NumPy archives (.npz) from anywhere: headers first, sizes bounded, never a pickle.

An archive is a zip file with one `.npy` member an array. What a header promises is compared with
what the zip directory promises before memory is taken for it.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from merge_rl.errors import DataFileError
from merge_rl.untrusted import open_file

FREE_BYTES: Final = 256 * 2**20  # what any member may expand to
MAX_EXPANSION: Final = 100  # times its compressed size, beyond that: real features stay below 10
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError,
)  # fmt: skip


@dataclass(frozen=True)
class ArrayInfo:
    """Shape and type of a stored array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool = False  # columns first

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def npz_arrays(path: Path) -> dict[str, ArrayInfo]:
    """Name -> shape and type of every array, in the order of the file; only headers are read."""
    found = {}
    with _opened(path) as archive:
        for member in archive.infolist():
            if member.filename.endswith(".npy"):
                with archive.open(member) as file:
                    found[member.filename[:-4]] = _header(file, member, path)
    if not found:
        raise DataFileError(f"{path}: expected a .npz file of arrays, found none in it")
    return found


def read_array(path: Path, name: str) -> npt.NDArray[Any]:
    """One array; refused where it would take far more memory than its file has bytes."""
    with _opened(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        if member.file_size > max(FREE_BYTES, MAX_EXPANSION * member.compress_size):
            raise DataFileError(
                f"{path}: array {name!r} would expand from {member.compress_size} to "
                f"{member.file_size} bytes, at most {MAX_EXPANSION} times are read"
            )
        with archive.open(member) as file:
            _require_numbers(_header(file, member, path), name, path)
        with archive.open(member) as file:
            array: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array


def read_rows(path: Path, name: str, rows: Sequence[int]) -> Iterator[npt.NDArray[Any]]:
    """The rows with these ascending indices, one at a time: memory for one row is enough."""
    with _opened(path) as archive:
        member = archive.getinfo(f"{name}.npy")
        with archive.open(member) as file:
            info = _header(file, member, path)
            _require_numbers(info, name, path)
            if info.fortran:
                raise DataFileError(f"{path}: array {name!r} is in Fortran order, expected C order")
            size = info.nbytes // max(info.shape[0], 1)
            position = 0
            for row in rows:
                _skip(file, (row - position) * size)
                data = file.read(size)
                if len(data) < size:
                    raise DataFileError(f"{path}: array {name!r} ends within row {row}")
                yield np.frombuffer(data, info.dtype).reshape(info.shape[1:])
                position = row + 1


def _skip(file: IO[bytes], count: int) -> None:
    while count > 0:
        count -= len(file.read(min(count, 2**20))) or count


def _require_numbers(info: ArrayInfo, name: str, path: Path) -> None:
    if info.dtype.hasobject or info.dtype.names is not None:
        raise DataFileError(
            f"{path}: array {name!r} is of type {info.dtype}, expected numbers; "
            "arrays of Python objects are never read"
        )


def _header(file: IO[bytes], member: zipfile.ZipInfo, path: Path) -> ArrayInfo:
    """Shape and type from the start of a member, checked against the member's size."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise DataFileError(f"{path}: {member.filename} is of version {version}, expected 1 or 2")
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read(file)
    name = member.filename[:-4]
    info = ArrayInfo(tuple(shape), dtype, fortran)
    if not dtype.hasobject and file.tell() + info.nbytes != member.file_size:
        raise DataFileError(
            f"{path}: array {name!r} of shape {info.shape} and type {dtype} needs {info.nbytes} "
            f"bytes, found {member.file_size - file.tell()}"
        )
    return info


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with open_file(path, DataFileError) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataFileError(f"{path}: not a readable .npz file: {reason}") from None
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read: {error.strerror or error}") from None
