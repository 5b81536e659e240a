"""The header of a safetensors file: read without the tensors, checked in full.

Format: 8 bytes little-endian length n, n bytes of JSON, then the tensors. The JSON maps each name
to dtype, shape and [begin, end) counted from the end of the header, and "__metadata__" to a
mapping of text to text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final

import torch

from merge_rl.errors import CheckpointError
from merge_rl.untrusted import open_file

MAX_HEADER_BYTES: Final = 100_000_000
MAX_ELEMENTS: Final = 2**60
METADATA_KEY: Final = "__metadata__"

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and type of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file holds, and where."""

    tensors: Mapping[str, TensorInfo]  # in the order of the file
    begins: Mapping[str, int]  # first byte of each tensor, from the start of the file
    metadata: Mapping[str, str]
    file_bytes: int


def read_header(path: Path) -> Header:
    """Header of the file at `path`; CheckpointError unless the whole file is as it says."""
    try:
        with open_file(path) as file:
            size = path.stat().st_size
            return parse_header(header_bytes(file, size, path), size, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


def parse_header(text: bytes, file_bytes: int, path: Path) -> Header:
    """Header from its JSON bytes, checked against the size of the file."""
    document = _parse_json(text, path)
    metadata = _check_metadata(document.pop(METADATA_KEY, {}), path)
    start = 8 + len(text)
    spans = [(*_span(name, entry, path), name) for name, entry in document.items()]
    # Sorting is stable: empty tensors that share an offset keep their order.
    spans.sort(key=lambda span: (span[0], span[1]))
    _check_layout([(begin, end, name) for begin, end, _, name in spans], file_bytes - start, path)
    return Header(
        tensors=MappingProxyType({name: info for _, _, info, name in spans}),
        begins=MappingProxyType({name: start + begin for begin, _, _, name in spans}),
        metadata=MappingProxyType(metadata),
        file_bytes=file_bytes,
    )


def header_length(first: bytes, file_bytes: int, path: Path) -> int:
    """Length of the JSON from a file's first eight bytes, bounded by the file and by a maximum."""
    if len(first) < 8:
        raise _foreign(path, f"{len(first)} bytes are too few for a header")
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER_BYTES:
        raise _foreign(path, f"its header would take {length} bytes, at most {MAX_HEADER_BYTES}")
    if 8 + length > file_bytes:
        raise _truncated(path, f"its header ends at byte {8 + length}", file_bytes)
    return length


def header_bytes(file: BinaryIO, size: int, path: Path) -> bytes:
    """The JSON of a file that is opened at its start; what follows is left to read."""
    length = header_length(file.read(8), size, path)
    text = file.read(length)
    if len(text) < length:
        raise _truncated(path, f"its header ends at byte {8 + length}", 8 + len(text))
    return text


def _parse_json(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise _foreign(path, "a name appears twice in its header")
        return values

    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise _foreign(path, "its header is not JSON") from None
    if not isinstance(document, dict):
        raise _foreign(path, "its header is not a JSON object")
    return document


def _check_metadata(value: object, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise _foreign(path, f"{METADATA_KEY} does not map text to text")
    return value


def _span(name: str, entry: object, path: Path) -> tuple[int, int, TensorInfo]:
    """(begin, end, info) of one tensor, consistent in itself."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _foreign(path, f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise CheckpointError(
            f"{path}: tensor {name!r} has dtype {dtype!r}, expected one of {known}"
        )
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise _foreign(path, f"tensor {name!r} has shape {shape!r} and offsets {offsets!r}")
    # An empty tensor needs no bytes, so that nothing else bounds its other dimensions.
    if math.prod(size or 1 for size in shape) > MAX_ELEMENTS:
        raise _foreign(path, f"tensor {name!r} has the impossible shape {shape}")
    info, (begin, end) = TensorInfo(tuple(shape), DTYPES[dtype]), offsets
    if end - begin != info.nbytes:
        message = f"tensor {name!r} of shape {shape} and dtype {dtype} needs {info.nbytes} bytes"
        raise CheckpointError(f"{path}: {message}, its offsets span {end - begin}")
    return begin, end, info


def _counts(value: object) -> bool:
    """Whether `value` is a list of whole numbers of at least 0."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(spans: list[tuple[int, int, str]], data_bytes: int, path: Path) -> None:
    """Tensors must follow one another without gap or overlap, up to the end of the file."""
    position = 0
    for begin, end, name in spans:
        if begin != position:
            what = "overlaps the one before it" if begin < position else "leaves a gap before it"
            raise _foreign(path, f"tensor {name!r} at offset {begin} {what}, expected {position}")
        position = end
    if position > data_bytes:
        raise _truncated(path, f"its tensors take {position} bytes", data_bytes)
    if position < data_bytes:
        extra = data_bytes - position
        raise _foreign(path, f"{extra} bytes follow the last tensor")


def _foreign(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path}: not a valid safetensors file: {why}")


def _truncated(path: Path, needs: str, found: int) -> CheckpointError:
    return CheckpointError(f"{path}: the file is truncated: {needs}, found {found}")
