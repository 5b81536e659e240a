"""The older torch format: five pickles in a row, then the storages.

EDM2 snapshots hold one such block a tensor (`torch.storage._load_from_bytes`); files of torch
before 1.6 are one as a whole. In order: a magic number, the protocol number, facts about the
machine, the object with persistent ids in place of storages, the list of storage keys; then each
storage in that order, as 8 bytes little-endian element count and the elements.
"""

from __future__ import annotations

from typing import Final

from merge_rl.errors import CheckpointError
from merge_rl.storage.byte_source import ByteSource, Cursor, Span
from merge_rl.storage.pickle_machine import Machine, Permitted
from merge_rl.storage.pickle_opcodes import run
from merge_rl.storage.pickle_values import Budget, kind_of, shown
from merge_rl.storage.torch_storage import STORAGES, StorageRef, storage_of

_MAGIC: Final = 0x1950A86A20F9469CFC6C
_PROTOCOL: Final = 1001
FIRST_BYTES: Final = b"\x80\x02\x8a\n" + _MAGIC.to_bytes(10, "little") + b"."
_PID_PARTS: Final = 6


def read_legacy(span: Span, permitted: Permitted, budget: Budget) -> object:
    """The object saved in `span`, with references to the storages behind it."""
    cursor = Cursor(span)
    _read_prologue(cursor, budget)
    storages: dict[str, StorageRef] = {}

    def persistent(pid: object, machine: Machine) -> StorageRef:
        found, key = storage_of(pid, machine, _PID_PARTS)
        known = storages.setdefault(key, found)
        if (known.dtype, known.count) != (found.dtype, found.count):
            raise machine.refuse(f"storage {shown(key)} is described in two ways")
        return known

    value = run(Machine(cursor, permitted, budget, persistent))
    _place(storages, run(Machine(cursor, {}, budget)), cursor, budget)
    return value


def load_from_bytes(args: tuple[object, ...], machine: Machine) -> object:
    """The storage in a block of bytes, one argument."""
    block = args[0] if len(args) == 1 else None
    if isinstance(block, bytes):
        block = Span(ByteSource(block, machine.budget.name), 0, len(block))
    if not isinstance(block, Span):
        raise machine.refuse(f"a tensor's block is {kind_of(block)}, expected bytes")
    # Only names of storages in here: a block within a block would have no end.
    value = read_legacy(block, dict.fromkeys(STORAGES), machine.budget)
    if not isinstance(value, StorageRef):
        raise machine.refuse(f"a tensor's block holds {kind_of(value)}, expected a storage")
    return value


def _read_prologue(cursor: Cursor, budget: Budget) -> None:
    magic, protocol, facts = (run(Machine(cursor, {}, budget)) for _ in range(3))
    if (type(magic), type(protocol)) != (int, int) or (magic, protocol) != (_MAGIC, _PROTOCOL):
        raise CheckpointError(f"{budget.name}: not a block written by torch.save")
    if not isinstance(facts, dict) or facts.get("little_endian") is not True:
        raise CheckpointError(f"{budget.name}: expected tensors in little-endian byte order")


def _place(storages: dict[str, StorageRef], keys: object, cursor: Cursor, budget: Budget) -> None:
    """Let every storage know where its bytes are."""
    listed = [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []
    if len(listed) != len(storages) or set(listed) != set(storages):
        raise CheckpointError(
            f"{budget.name}: {len(storages)} storages are used, but {len(listed)} are listed"
        )
    for key in listed:
        storage = storages[key]
        count = int.from_bytes(cursor.take(8), "little")
        if count != storage.count:
            raise CheckpointError(
                f"{budget.name}: storage {shown(key)} holds {count} elements,"
                f" expected {storage.count}"
            )
        storage.span = cursor.skip(count * storage.dtype.itemsize)
    if cursor.remaining:
        raise CheckpointError(f"{budget.name}: {cursor.remaining} bytes follow the last storage")
