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

import io
import os
from typing import BinaryIO, Final, TypeAlias, cast

from merge_rl.errors import CheckpointError
from merge_rl.storage.files import LOCAL_HEADER, Archive, kind_by_content
from merge_rl.storage.pickles import tensors as torch_legacy
from merge_rl.storage.pickles.machine import Machine, require_tree
from merge_rl.storage.pickles.names import PERMITTED
from merge_rl.storage.pickles.opcodes import run
from merge_rl.storage.pickles.spans import END_BYTES, ByteSource, Cursor, PartSource, Readable, Span
from merge_rl.storage.pickles.tensors import StorageRef, TensorRef, storage_of
from merge_rl.storage.pickles.values import Budget, shown

FIRST_BYTES: Final = b"PK\x03\x04"
_PID_PARTS: Final = 5
_PICKLE: Final = "data.pkl"
_MAX_DIRECTORY: Final = 32 * 2**20  # bytes of a table of contents: some 200,000 entries
Alike: TypeAlias = "dict[bytes, tuple[str, TensorRef]]"
"""What archives of one tensor say of it, by the bytes of their pickle: its storage's name, itself.

Most tensors of a network share shape and type with others, so that their pickles are equal.
"""


def read_pickle(content: Readable, name: str | None = None) -> object:
    """The value of a pickle, from a path or from the bytes themselves; `name` is for messages."""
    source = ByteSource(content, name)
    return _checked(_plain_pickle(source, _budget(source)), source)


def read_data(
    content: Readable | Span, name: str | None = None, alike: Alike | None = None
) -> object:
    """The value of a pickle or of anything torch.save wrote, whatever the file is called.

    Of many archives of one tensor each, `alike` remembers what was read.
    """
    source = PartSource(content) if isinstance(content, Span) else ByteSource(content, name)
    budget, first = _budget(source), source.read(0, min(source.size, 32))
    if first.startswith(FIRST_BYTES):
        return _checked(read_archive(source, budget, alike), source)
    if first.startswith(torch_legacy.FIRST_BYTES):
        whole = Span(source, 0, source.size)
        return _checked(torch_legacy.read_legacy(whole, PERMITTED, budget), source)
    try:
        return _checked(_plain_pickle(source, budget), source)
    except CheckpointError:
        kind = kind_by_content(first)
        if kind is None or kind == "a pickle":
            raise
        expected = "what torch.save or pickle writes"
        raise CheckpointError(f"{source.name}: expected {expected}, found {kind}") from None


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


def read_archive(source: ByteSource, budget: Budget, alike: Alike | None = None) -> object:
    """The object in an archive, with references to its storages."""
    archive = TorchArchive(source, budget)
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
    pickled, storages = archive.span(pickles[0]), dict[str, StorageRef]()

    def persistent(pid: object, machine: Machine) -> StorageRef:
        found, key = storage_of(pid, machine, _PID_PARTS)
        if key not in storages:
            found.span = archive.span(f"{prefix}data/{key}")
            storages[key] = found
        known = storages[key]
        expected = found.nbytes
        if known.code != found.code or known.span is None or known.span.length != expected:
            raise machine.refuse(f"storage {shown(key)} is not of {expected} bytes of {found.code}")
        return known

    content = b"" if alike is None or pickled.length > END_BYTES else pickled.read()
    if alike and content in alike:
        key, like = alike[content]
        span = archive.span(f"{prefix}data/{key}")
        if span.length == like.storage.nbytes:  # else the machine says what is wrong
            return like.moved(span)
    value = run(Machine(Cursor(pickled), PERMITTED, budget, persistent))
    if alike is not None and content and isinstance(value, TensorRef) and len(storages) == 1:
        alike[content] = next(iter(storages)), value
    return value


class TorchArchive:
    """Names of a zip file's entries, and their bytes as spans: torch.save does not compress."""

    def __init__(self, source: ByteSource, budget: Budget) -> None:
        self._source = source
        with Archive(
            lambda: cast(BinaryIO, _AsFile(source)), source.name, CheckpointError, "archive",
            min(_MAX_DIRECTORY, source.size),
        ) as archive:  # fmt: skip
            self._members = {member.orig_filename: member for member in archive.infolist()}
            self._ends = archive.ends
        budget.spend(1000 * len(self._members) + 2 * sum(map(len, self._members)))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._members)

    def span(self, name: str) -> Span:
        """The bytes of an entry; CheckpointError if it is missing, compressed or out of bounds."""
        member = self._members.get(name)
        if member is None:
            raise CheckpointError(f"{self._source.name}: the archive lacks '{shown(name)}'")
        if member.compress_type or member.flag_bits & 1:
            how = "compressed" if member.compress_type else "encrypted"
            raise CheckpointError(
                f"{self._source.name}: '{shown(name)}' is {how}, expected as torch.save stores it"
            )
        head = self._source.read(member.header_offset, LOCAL_HEADER.size)
        mark, *_, name_length, extra_length = LOCAL_HEADER.unpack(head)
        begin = member.header_offset + LOCAL_HEADER.size + name_length + extra_length
        if (
            mark != FIRST_BYTES
            or member.file_size != member.compress_size
            or begin + member.file_size > self._ends[name]
        ):
            raise CheckpointError(
                f"{self._source.name}: not a readable archive: '{shown(name)}' is not where the "
                "table of contents says"
            )
        return Span(self._source, begin, member.file_size)


class _AsFile(io.RawIOBase):
    """A source as a file, for the reader of the table of contents."""

    def __init__(self, source: ByteSource) -> None:
        self._source, self._at = source, 0

    def read(self, count: int | None = -1) -> bytes:
        """At most `count` bytes from the current place on."""
        left = max(self._source.size - self._at, 0)
        data = self._source.read(
            min(self._at, self._source.size),
            left if count is None or count < 0 else min(count, left),
        )
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; OSError before the start."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._source.size}[whence]
        if start + offset < 0:
            raise OSError("a place before the start")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True
