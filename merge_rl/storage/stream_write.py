"""From one file to another: tensors are read, checked, hashed and written in small pieces."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Final

from merge_rl.errors import CheckpointError, NonFiniteWeightsError
from merge_rl.storage.atomic import atomic_path
from merge_rl.storage.extracted import infos_of
from merge_rl.storage.finite import count_nonfinite
from merge_rl.storage.safetensors_file import write_header
from merge_rl.storage.torch_storage import TensorRef

PIECE_BYTES: Final = 2**20  # fits the cache of a core: hashing and checking run over it


def write_stream(
    path: Path,
    tensors: Mapping[str, TensorRef],
    metadata: Mapping[str, str],
    advance: Callable[[int], None],
    source: Path,
) -> str:
    """Write a safetensors file atomically from tensors elsewhere; its SHA-256.

    Memory: a few pieces of 1 MiB, whatever the size. `advance` hears of bytes done. The types stay
    as they are. Raises NonFiniteWeightsError rather than leave a file of NaN.
    """
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            return _write(file, tensors, metadata, advance, source)
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> CheckpointError:
    """What to raise when the disk did not take a file."""
    reason = str(error.strerror or error).removeprefix("cannot be written: ")
    return CheckpointError(f"{path}: cannot be written: {reason}")


def check_finite(
    tensors: Mapping[str, TensorRef], advance: Callable[[int], None], source: Path
) -> None:
    """Read tensors and do nothing else; NonFiniteWeightsError if one holds NaN or infinity."""
    for name, tensor in tensors.items():
        for piece in _finite_pieces(name, tensor, source):
            advance(len(piece))


def _write(
    file: BinaryIO,
    tensors: Mapping[str, TensorRef],
    metadata: Mapping[str, str],
    advance: Callable[[int], None],
    source: Path,
) -> str:
    header = io.BytesIO()
    order = write_header(header, infos_of(tensors), metadata)
    digest = hashlib.sha256(header.getvalue())
    file.write(header.getvalue())
    # Hashing takes about as long as writing, and both let other threads run.
    with ThreadPoolExecutor(1) as pool:
        hashed: Future[None] | None = None
        for name in order:
            for piece in _finite_pieces(name, tensors[name], source):
                if hashed is not None:
                    hashed.result()
                hashed = pool.submit(digest.update, piece)
                file.write(piece)
                advance(len(piece))
        if hashed is not None:
            hashed.result()
    return digest.hexdigest()


def _finite_pieces(name: str, tensor: TensorRef, source: Path) -> Iterator[bytes]:
    for piece in tensor.pieces(PIECE_BYTES):
        count = count_nonfinite(piece, tensor.dtype)
        if count:
            raise NonFiniteWeightsError(
                f"{source}: tensor {name} holds NaN or infinity in at least {count} of its values"
            )
        yield piece
