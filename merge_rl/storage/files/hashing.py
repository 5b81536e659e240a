"""SHA-256 of files, read in pieces."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from merge_rl.errors import CheckpointError, HashMismatchError
from merge_rl.untrusted import open_file

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

CHUNK_BYTES = 16 * 2**20


def sha256_file(path: Path, progress: Progress | None = None) -> str:
    """Hexadecimal SHA-256 of a file of any size, in constant memory."""
    digest, done = hashlib.sha256(), 0
    try:
        total = path.stat().st_size
        with open_file(path) as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


def require_hash(path: Path, found: str, expected: str | None) -> None:
    """Refuse a file whose hash is not the recorded one; None means nothing was recorded."""
    if expected is not None and found != expected:
        raise HashMismatchError(
            f"{path}: SHA-256 is {found}, but the manifest records {expected}: "
            "the file was damaged or replaced"
        )
