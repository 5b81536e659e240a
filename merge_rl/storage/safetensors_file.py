"""Tensors of a safetensors file: read all, read one, write.

Written here rather than with the safetensors library because that one orders the metadata at
random: equal input must give equal bytes, so that hashes of runs can be compared.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from merge_rl.errors import CheckpointError, NonFiniteWeightsError
from merge_rl.storage.hashing import CHUNK_BYTES
from merge_rl.storage.safetensors_header import (
    DTYPES,
    METADATA_KEY,
    Header,
    TensorInfo,
    header_length,
    parse_header,
)

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("merge_rl reads and writes safetensors on little-endian machines only")


def read_file(path: Path, *, hashed: bool) -> tuple[Header, dict[str, Tensor], str | None]:
    """(header, tensors, SHA-256 or None) of a file, read once.

    The tensors are views of one buffer. What was hashed is exactly what is returned, even if
    somebody replaces the file meanwhile.
    """
    data, digest = _read_bytes(path, hashed)
    length = header_length(bytes(data[:8]), len(data), path)
    header = parse_header(bytes(data[8 : 8 + length]), len(data), path)
    tensors = {
        name: _view(data, header.begins[name], info) for name, info in header.tensors.items()
    }
    return header, tensors, digest


def read_one(path: Path, header: Header, name: str) -> Tensor:
    """One tensor of a file whose header was read before."""
    info = header.tensors[name]
    try:
        with path.open("rb") as file:
            file.seek(header.begins[name])
            data = bytearray(file.read(info.nbytes))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) < info.nbytes:
        raise CheckpointError(f"{path}: the file became shorter since it was opened")
    return _view(data, 0, info)


def require_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity in a floating or complex tensor; whole numbers always pass."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    # isfinite is not implemented for the 8-bit floats.
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        count = tensor.numel() - int(finite.sum())
        raise NonFiniteWeightsError(
            f"{path}: tensor {name!r} holds NaN or infinity in {count} of {tensor.numel()} values"
        )


def write_tensors(
    file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write header and tensors; wider types first, else in the order given."""
    # Widest first keeps every tensor aligned to its own size: readers map the file into memory.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, object] = {METADATA_KEY: dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name in order:
        info = TensorInfo(tuple(tensors[name].shape), tensors[name].dtype)
        if name == METADATA_KEY or info.dtype not in _NAMES:
            raise CheckpointError(f"tensor {name!r} of {info.dtype} cannot be stored")
        end = position + info.nbytes
        entry = {"dtype": _NAMES[info.dtype], "shape": list(info.shape)}
        header[name] = {**entry, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        file.write(_bytes(tensors[name]))


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, without a copy where it is on the CPU and contiguous."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _read_bytes(path: Path, hashed: bool) -> tuple[bytearray, str | None]:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            data = bytearray(path.stat().st_size)
            for piece in _pieces(file, memoryview(data), path):
                if hashed:
                    digest.update(piece)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    return data, digest.hexdigest() if hashed else None


def _pieces(file: BinaryIO, target: memoryview, path: Path) -> Iterator[memoryview]:
    position = 0
    while position < len(target):
        piece = target[position : position + CHUNK_BYTES]
        # BufferedReader.readinto fills the piece unless the file ends.
        if file.readinto(piece) < len(piece):  # type: ignore[attr-defined]
            raise CheckpointError(f"{path}: the file became shorter while it was read")
        position += len(piece)
        yield piece


def _view(data: bytearray, begin: int, info: TensorInfo) -> Tensor:
    """Tensor over the bytes from `begin` on, a view where alignment allows it."""
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=info.dtype)
    count = info.nbytes // info.dtype.itemsize
    if begin % info.dtype.itemsize:
        data, begin = data[begin : begin + info.nbytes], 0
    return torch.frombuffer(data, dtype=info.dtype, count=count, offset=begin).reshape(info.shape)
