"""Tensors of a safetensors file: read all, read one, write.

Headers are read by the safetensors library, tensors here: each into aligned memory of its own, in
one pass that hashes them. Written here because the library orders the metadata at random: equal
input must give equal bytes, so that hashes of runs can be compared.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from merge_rl.errors import CheckpointError, NonFiniteWeightsError
from merge_rl.late import torch
from merge_rl.storage.files.documents import CHUNK_BYTES
from merge_rl.storage.files.safetensors_header import (
    CODES,
    METADATA_KEY,
    Header,
    TensorInfo,
    read_header,
)
from merge_rl.untrusted import open_file

if TYPE_CHECKING:
    from torch import Tensor

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("merge_rl reads and writes safetensors on little-endian machines only")


def read_file(path: Path, *, hashed: bool) -> tuple[Header, dict[str, Tensor], str | None]:
    """(header, tensors, SHA-256 or None) of a file, read once.

    What was hashed is exactly what is returned, even if somebody replaces the file meanwhile. Each
    tensor has memory of its own, aligned as torch aligns what it makes: the linear algebra library
    sums in an order that depends on alignment, and results may not depend on where a file keeps
    its values.
    """
    digest = hashlib.sha256()
    try:
        with open_file(path) as file:
            opened = _stamp(os.fstat(file.fileno()))
            header = read_header(path)
            if _stamp(path.stat()) != opened:
                raise CheckpointError(f"{path}: the file was replaced while it was read")
            digest.update(file.read(header.file_bytes - header.tensor_bytes))
            tensors = {n: torch.empty(i.shape, dtype=i.dtype) for n, i in header.tensors.items()}
            # In the order of the file, in which one follows the other.
            for piece in _pieces(file, [tensor_bytes(t) for t in tensors.values()], path):
                if hashed:
                    digest.update(piece)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    return header, tensors, digest.hexdigest() if hashed else None


class TensorReader:
    """An open file from which parts of tensors are read; several threads may share it."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        try:
            # Unbuffered: a buffer would be filled with bytes that nobody asked for.
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def fill(self, target: memoryview, begin: int) -> None:
        """Fill `target` with the bytes of the file from `begin` on."""
        try:
            while len(target):
                count = os.preadv(self._file.fileno(), [target], begin)
                if not count:
                    raise CheckpointError(
                        f"{self.path}: the file became shorter since it was opened"
                    )
                target, begin = target[count:], begin + count
        except OSError as error:
            reason = error.strerror or error
            raise CheckpointError(f"{self.path}: cannot be read: {reason}") from None


def map_file(path: Path, header: Header) -> dict[str, Tensor]:
    """All tensors of a file as views of its mapping; the system loads and drops pages at will.

    A tensor that does not start at a multiple of its element's size is copied instead.
    """
    try:
        # Private: nothing that is written to the tensors reaches the file.
        mapping = torch.from_file(
            str(path), shared=False, size=header.file_bytes, dtype=torch.uint8
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be mapped into memory: {reason}") from None
    views = {}
    for name, info in header.tensors.items():
        part = mapping[header.begins[name] : header.begins[name] + info.nbytes]
        aligned = header.begins[name] % info.itemsize == 0
        views[name] = (part if aligned else part.clone()).view(info.dtype).reshape(info.shape)
    return views


# Integer type of the same size, mask of exponent and mantissa, range of what is not finite.
_FORMATS: Final[Mapping[str, tuple[npt.DTypeLike, int, int, int]]] = {
    "F16": (np.uint16, 0x7FFF, 0x7C00, 0x7FFF),
    "BF16": (np.uint16, 0x7FFF, 0x7F80, 0x7FFF),
    "F32": (np.uint32, 0x7FFF_FFFF, 0x7F80_0000, 0x7FFF_FFFF),
    "C64": (np.uint32, 0x7FFF_FFFF, 0x7F80_0000, 0x7FFF_FFFF),
    "F64": (np.uint64, 2**63 - 1, 0x7FF0_0000_0000_0000, 2**63 - 1),
    "F8_E4M3": (np.uint8, 0x7F, 0x7F, 0x7F),
    "F8_E5M2": (np.uint8, 0x7F, 0x7C, 0x7F),
    "F8_E8M0": (np.uint8, 0xFF, 0xFF, 0xFF),
    "F8_E4M3FNUZ": (np.uint8, 0xFF, 0x80, 0x80),
    "F8_E5M2FNUZ": (np.uint8, 0xFF, 0x80, 0x80),
}


def count_nonfinite(data: bytes | memoryview, code: str) -> int:
    """How many of the numbers in little-endian `data` are NaN or infinite; 0 for whole numbers."""
    if code not in _FORMATS or not len(data):
        return 0
    word, bits, least, most = _FORMATS[code]
    values = np.frombuffer(data, dtype=word) & np.array(bits, dtype=word)
    if int(values.max()) < least:
        return 0
    return int(((values >= least) & (values <= most)).sum())


def check_file(path: Path, header: Header) -> tuple[str, CheckpointError | None]:
    """(SHA-256, what is wrong with the values if anything) of a file that is read once.

    No tensor is made, so that torch is not needed. Raises CheckpointError for a file that cannot be
    read or is not as its header says.
    """
    digest, problem, piece = hashlib.sha256(), None, bytearray(CHUNK_BYTES)
    try:
        with open_file(path) as file:
            if read_header(path) != header:
                raise CheckpointError(f"{path}: the file has changed since the set was opened")
            digest.update(file.read(header.file_bytes - header.tensor_bytes))
            for name, info in header.tensors.items():
                odd = 0
                for part in _pieces(file, _slices(memoryview(piece), info.nbytes), path):
                    digest.update(part)
                    odd += count_nonfinite(part, info.code)
                problem = problem or (nonfinite(path, name, odd, info) if odd else None)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    return digest.hexdigest(), problem


def _slices(buffer: memoryview, size: int) -> Iterator[memoryview]:
    """One buffer again and again, as far as it takes to hold `size` bytes."""
    for start in range(0, size, len(buffer)):
        yield buffer[: min(len(buffer), size - start)]


def nonfinite(path: Path, name: str, count: int, info: TensorInfo) -> NonFiniteWeightsError:
    """What to raise for so many values of a tensor in the file at `path`."""
    numel = math.prod(info.shape)
    return NonFiniteWeightsError(
        f"{path}: tensor {name!r} holds NaN or infinity in {count} of {numel} values"
    )


def require_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity in a floating or complex tensor; whole numbers always pass."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    # isfinite is not implemented for the 8-bit floats.
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    # A sum tells of both, at a tenth of the cost; where it overflows by itself, a look at each.
    wide = torch.float32 if values.dtype.itemsize < 4 else values.dtype
    if bool(torch.isfinite(values.sum(dtype=wide))):
        return
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        info = TensorInfo.of(tuple(tensor.shape), tensor.dtype)
        raise nonfinite(path, name, tensor.numel() - int(finite.sum()), info)


def write_tensors(
    file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write header and tensors; wider types first, else in the order given."""
    infos = {name: TensorInfo.of(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    order = write_header(file, infos, metadata)
    for name in order:
        file.write(tensor_bytes(tensors[name]))


def write_header(
    file: BinaryIO, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> list[str]:
    """Write the header alone; the names in the order in which their bytes must follow.

    For files whose tensors come one by one. Wider types come first, else the order is that given:
    so every tensor is aligned to its own size, and readers can map the file into memory.
    """
    order = sorted(infos, key=lambda name: -infos[name].itemsize)
    # Readers refuse halves of characters, which Python has for names of files that are no text.
    notes = {key: metadata[key].encode("utf-8", "replace").decode() for key in sorted(metadata)}
    header: dict[str, object] = {METADATA_KEY: notes} if notes else {}
    position = 0
    for name in order:
        info = infos[name]
        if name == METADATA_KEY or info.code not in CODES:
            raise CheckpointError(f"tensor {name!r} of torch.{info.type_name} cannot be stored")
        end = position + info.nbytes
        entry = {"dtype": info.code, "shape": list(info.shape)}
        header[name] = {**entry, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    return order


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, without a copy where it is on the CPU and contiguous."""
    if not tensor.numel():  # whose strides may be any
        return memoryview(bytearray())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _stamp(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _pieces(file: BinaryIO, targets: Iterable[memoryview], path: Path) -> Iterator[memoryview]:
    parts = ((t, start) for t in targets for start in range(0, len(t), CHUNK_BYTES))
    for target, start in parts:
        piece = target[start : start + CHUNK_BYTES]
        # BufferedReader.readinto fills the piece unless the file ends.
        if file.readinto(piece) < len(piece):  # type: ignore[attr-defined]
            raise CheckpointError(f"{path}: the file became shorter while it was read")
        yield piece
