"""The table of contents of a zip file whose entries are stored as they are.

Torch writes such files. Entries become spans of the file; nothing is decompressed, so that no
entry can be larger than the file.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from merge_rl.errors import CheckpointError
from merge_rl.storage.byte_source import ByteSource, Span
from merge_rl.storage.pickle_values import Budget, shown

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
