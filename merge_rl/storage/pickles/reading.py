"""Pickles and torch files as plain data: nothing in the file is imported, looked up or run.

What comes out: dict, list, tuple, set, text, numbers, bytes; `Span` for longer bytes, which stay
in the file until `bytes(span)` is asked for; NumPy arrays of plain numbers (read-only); `TensorRef`
for tensors; `Record` for objects of the few known classes; `Global` where such a class is
mentioned. Ordered and attribute dicts are dicts. What comes out can be walked by recursion: it
has no cycles, at most 200 levels and at most two million values.

Anything else, whatever the file is made of, is a `CheckpointError`; time and memory are bounded
by the size of the file.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from merge_rl.errors import CheckpointError

# SELF torch_archive
from merge_rl.storage.pickles import tensors as torch_legacy
from merge_rl.storage.pickles.machine import Machine, require_tree
from merge_rl.storage.pickles.names import PERMITTED
from merge_rl.storage.pickles.opcodes import run
from merge_rl.storage.pickles.spans import ByteSource, Cursor, Readable, Span
from merge_rl.storage.pickles.tensors import StorageRef, storage_of
from merge_rl.storage.pickles.values import Budget, shown


def read_pickle(content: Readable, name: str | None = None) -> object:
    """The value of a pickle, from a path or from the bytes themselves; `name` is for messages."""
    source = ByteSource(content, name)
    return _checked(_plain_pickle(source, _budget(source)), source)


def read_data(content: Readable, name: str | None = None) -> object:
    """The value of a pickle or of anything torch.save wrote, whatever the file is called."""
    source = ByteSource(content, name)
    budget, first = _budget(source), source.read(0, min(source.size, 32))
    if first.startswith(FIRST_BYTES):
        return _checked(read_archive(source, budget), source)
    if first.startswith(torch_legacy.FIRST_BYTES):
        whole = Span(source, 0, source.size)
        return _checked(torch_legacy.read_legacy(whole, PERMITTED, budget), source)
    return _checked(_plain_pickle(source, budget), source)


def _budget(source: ByteSource) -> Budget:
    if not source.size:
        raise CheckpointError(f"{source.name}: the file is empty")
    return Budget(source.name, source.size)


def _plain_pickle(source: ByteSource, budget: Budget) -> object:
    cursor = Cursor(Span(source, 0, source.size))
    value = run(Machine(cursor, PERMITTED, budget))
    if cursor.remaining:
        raise CheckpointError(f"{source.name}: {cursor.remaining} bytes follow the end of its data")
    return value


def _checked(value: object, source: ByteSource) -> object:
    require_tree(value, source.name)
    return value


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


_MAX_ENTRIES: Final = 200_000
_END: Final = struct.Struct("<4s4H2LH")
_LOCATOR: Final = struct.Struct("<4sLQL")
_END64: Final = struct.Struct("<4sQ2H2L4Q")
_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_LOCAL: Final = struct.Struct("<4s5H3L2H")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF


@dataclass(frozen=True)
class _Entry:
    offset: int
    size: int
    method: int
    flags: int


class ZipDirectory:
    """Names of a zip file's entries, and their bytes as spans."""

    def __init__(self, source: ByteSource, budget: Budget) -> None:
        self._source = source
        try:
            count, size, self._start = self._find_directory()
            if count > min(_MAX_ENTRIES, size // _CENTRAL.size) or size > source.size:
                raise self._damaged(f"{count} entries in {size} bytes")
            budget.spend(1000 * count + 2 * size)
            self._entries = self._parse(source.read(self._start, size), count)
        except (struct.error, UnicodeDecodeError):
            raise self._damaged("its table of contents is cut short or garbled") from None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def span(self, name: str) -> Span:
        """The bytes of an entry; CheckpointError if it is missing, compressed or out of bounds."""
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self._source.name}: the archive lacks '{shown(name)}'")
        if entry.method or entry.flags & 1:
            how = "compressed" if entry.method else "encrypted"
            raise CheckpointError(
                f"{self._source.name}: '{shown(name)}' is {how}, expected as torch.save stores it"
            )
        head = self._source.read(entry.offset, _LOCAL.size)
        mark, *_, name_length, extra_length = _LOCAL.unpack(head)
        begin = entry.offset + _LOCAL.size + name_length + extra_length
        if mark != b"PK\x03\x04" or begin + entry.size > self._start:
            raise self._damaged(f"'{shown(name)}' is not where the table of contents says")
        return Span(self._source, begin, entry.size)

    def _find_directory(self) -> tuple[int, int, int]:
        """(entries, bytes, offset) of the table of contents."""
        length = min(self._source.size, _END.size + _FULL16)
        tail = self._source.read(self._source.size - length, length)
        at = tail.rfind(b"PK\x05\x06")
        if at < 0:
            raise self._damaged("the file is truncated: no table of contents at its end")
        _, _, _, _, count, size, offset, _ = _END.unpack_from(tail, at)
        if count == _FULL16 or size == _FULL32 or offset == _FULL32:
            if at < _LOCATOR.size:
                raise self._damaged("no second table of contents")
            mark, _, place, _ = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)
            end = self._source.read(place, _END64.size)
            mark64, *_, count, size, offset = _END64.unpack(end)
            if (mark, mark64) != (b"PK\x06\x07", b"PK\x06\x06"):
                raise self._damaged("no second table of contents")
        return count, size, offset

    def _parse(self, table: bytes, count: int) -> dict[str, _Entry]:
        entries: dict[str, _Entry] = {}
        at = 0
        for _ in range(count):
            fields = _CENTRAL.unpack_from(table, at)
            mark, _, _, flags, method, _, _, _, packed, size, name_length, extra_length = fields[
                :12
            ]
            comment_length, offset = fields[12], fields[16]
            begin = at + _CENTRAL.size
            name = table[begin : begin + name_length].decode("utf-8")
            extra = table[begin + name_length : begin + name_length + extra_length]
            size, packed, offset = _wide(extra, size, packed, offset)
            if mark != b"PK\x01\x02" or name in entries or (method == 0 and packed != size):
                raise self._damaged(f"the entry '{shown(name)}' is listed twice or garbled")
            entries[name] = _Entry(offset, size, method, flags)
            at = begin + name_length + extra_length + comment_length
        return entries

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self._source.name}: not a readable archive: {why}")


def _wide(extra: bytes, *values: int) -> tuple[int, ...]:
    """The 64-bit values that stand in the extra field for those that do not fit 32 bits."""
    at, wide = 0, b""
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = extra[at + 4 : at + 4 + length]
        at += 4 + length
    found, used = [], 0
    for value in values:
        if value == _FULL32:
            (value,) = struct.unpack_from("<Q", wide, used)
            used += 8
        found.append(value)
    return tuple(found)
