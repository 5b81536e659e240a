"""Atomic writes: a file under its final name is always complete.

Whatever ends a program half-way (an error, a full disk, a power cut) leaves either the old file
or the new one.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml
from torch import Tensor

from merge_rl.storage.safetensors_file import write_tensors


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Temporary path to write to; becomes `path` on leaving the block, or vanishes on an error.

    The body writes one file there. It lies in the same folder (made when missing), because a
    rename is atomic only within a file system, and keeps the ending, which some writers go by.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp-{secrets.token_hex(6)}-{target.name}")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            # A full disk names no file by itself.
            reason = f"cannot be written: {error.strerror}"
            raise OSError(error.errno, reason, str(target)) from None
        raise
    # Not every file system lets a folder be synced; the file itself is safe by now.
    with suppress(OSError):
        _sync(target.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically, line ends as given."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write one JSON document atomically; ValueError for NaN and infinity, which JSON lacks."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_yaml(path: str | os.PathLike[str], value: object) -> None:
    """Write one YAML document of plain data atomically, keys in the order given."""
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    write_text(path, text)


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file atomically; equal input gives equal bytes.

    Tensors of any device and memory layout are taken; they may share memory.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        write_tensors(file, tensors, metadata or {})


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
