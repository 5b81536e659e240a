"""What torch.save writes, as data: a zip archive with `data.pkl` and one entry a storage."""

from __future__ import annotations

from typing import Final

from merge_rl.errors import CheckpointError
from merge_rl.storage.byte_source import ByteSource, Cursor
from merge_rl.storage.pickle_globals import PERMITTED
from merge_rl.storage.pickle_machine import Machine
from merge_rl.storage.pickle_opcodes import run
from merge_rl.storage.pickle_values import Budget, shown
from merge_rl.storage.torch_storage import StorageRef, storage_of
from merge_rl.storage.zip_directory import ZipDirectory

FIRST_BYTES: Final = b"PK\x03\x04"
_PID_PARTS: Final = 5
_PICKLE: Final = "data.pkl"


def read_archive(source: ByteSource, budget: Budget) -> object:
    """The object in an archive, with references to its storages."""
    archive = ZipDirectory(source, budget)
    pickles = [name for name in archive.names if name.partition("/")[2] == _PICKLE]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{source.name}: not written by torch.save: expected one {_PICKLE!r} in a folder,"
            f" found {len(pickles)}"
        )
    prefix = pickles[0].removesuffix(_PICKLE)
    order = f"{prefix}byteorder"
    if order in archive.names and archive.span(order).read() != b"little":
        raise CheckpointError(f"{source.name}: expected tensors in little-endian byte order")
    storages: dict[str, StorageRef] = {}

    def persistent(pid: object, machine: Machine) -> StorageRef:
        found, key = storage_of(pid, machine, _PID_PARTS)
        if key not in storages:
            found.span = archive.span(f"{prefix}data/{key}")
            storages[key] = found
        known = storages[key]
        expected = found.count * found.dtype.itemsize
        if known.dtype != found.dtype or known.span is None or known.span.length != expected:
            raise machine.refuse(
                f"storage {shown(key)} is not of {expected} bytes of {found.dtype}"
            )
        return known

    cursor = Cursor(archive.span(pickles[0]))
    return run(Machine(cursor, PERMITTED, budget, persistent))
