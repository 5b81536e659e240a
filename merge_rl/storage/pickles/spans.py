"""Bytes of an untrusted file, in bounded pieces: what is large stays on disk until it is asked for.

Files are read, not mapped: mapped pages count as memory in use, and a mapped file that another
program shortens ends the process instead of raising an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeAlias

from merge_rl.errors import CheckpointError
from merge_rl.untrusted import open_file

Readable: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview"
"""A path, or the content itself."""

WINDOW_BYTES: Final = 16 * 2**10
MAX_LINE_BYTES: Final = 64 * 2**10
END_BYTES: Final = 4 * 2**10
_READING: Final = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


class ByteSource:
    """A file or a buffer. No file stays open between two reads; one that has changed is refused."""

    def __init__(self, content: Readable, name: str | None = None) -> None:
        self._buffer: memoryview | None = None
        self._stamp: tuple[int, int, int] | None = None
        if isinstance(content, (bytes, bytearray, memoryview)):
            self.name = name or "buffer"
            self._buffer = memoryview(content).cast("B")
            self.size = len(self._buffer)
            return
        self._path = Path(content)
        self.name = name or str(self._path)
        with open_file(self._path) as file:
            self._stamp = _stamp(os.fstat(file.fileno()))
        self.size = self._stamp[0]

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset` on; CheckpointError if there are fewer."""
        if offset < 0 or length < 0 or offset + length > self.size:
            end = offset + length
            raise CheckpointError(
                f"{self.name}: the file is truncated: needs {end} bytes, found {self.size}"
            )
        if self._buffer is not None:
            return bytes(self._buffer[offset : offset + length])
        try:
            # Without a file object, which takes longer to make than most reads take.
            descriptor = os.open(self._path, _READING)
            try:
                if _stamp(os.fstat(descriptor)) != self._stamp:
                    raise CheckpointError(f"{self.name}: the file has changed since it was opened")
                os.lseek(descriptor, offset, os.SEEK_SET)
                return self._read_all(descriptor, length)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._unreadable(error) from None

    def _read_all(self, descriptor: int, length: int) -> bytes:
        # One read may return less than was asked for.
        data = os.read(descriptor, length)
        while len(data) < length:
            more = os.read(descriptor, length - len(data))
            if not more:
                raise CheckpointError(f"{self.name}: the file became shorter while it was read")
            data += more
        return data

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self.name}: cannot be read: {error.strerror or error}")


class Span:
    """A stretch of a source: bytes that are read when they are asked for. `bytes(span)` is all."""

    __slots__ = ("_bytes", "length", "offset", "source")

    def __init__(self, source: ByteSource, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > source.size:
            raise CheckpointError(
                f"{source.name}: the file is truncated: {length} bytes from byte {offset} on"
                f" were expected, the file has {source.size}"
            )
        self.source, self.offset, self.length = source, offset, length
        self._bytes: bytes | None = None

    def __len__(self) -> int:
        return self.length

    def __bytes__(self) -> bytes:
        # Kept: however often a file refers to a stretch of itself, it is in memory once.
        if self._bytes is None:
            self._bytes = self.read()
        return self._bytes

    def __repr__(self) -> str:
        return f"<{self.length} bytes of {self.source.name}>"

    def read(self) -> bytes:
        """All bytes, read again each time."""
        return self.source.read(self.offset, self.length)

    def part(self, begin: int, length: int) -> Span:
        """`length` bytes from `begin` on, counted from the start of this span."""
        if begin < 0 or length < 0 or begin + length > self.length:
            raise CheckpointError(
                f"{self.source.name}: the file is truncated: {length} bytes from byte"
                f" {self.offset + begin} on were expected, {self.length - begin} are there"
            )
        return Span(self.source, self.offset + begin, length)

    def pieces(self, size: int) -> Iterator[bytes]:
        """The bytes in order, at most `size` at a time."""
        for begin in range(0, self.length, size):
            yield self.source.read(self.offset + begin, min(size, self.length - begin))


class PartSource(ByteSource):
    """A stretch of a file as a file of its own.

    Its ends are kept once they were read: what an archive says of itself lies there, in a dozen
    places, and a checkpoint may be of thousands of archives.
    """

    def __init__(self, span: Span) -> None:
        self._span = span
        self._ends: dict[int, bytes] = {}
        self.name, self.size = span.source.name, span.length

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset` on; CheckpointError if there are fewer."""
        end = offset + length
        for begin in (0, max(0, self.size - END_BYTES)):
            if begin <= offset <= end <= min(begin + END_BYTES, self.size):
                if begin not in self._ends:
                    size = min(END_BYTES, self.size)
                    self._ends[begin] = self._span.part(begin, size).read()
                return self._ends[begin][offset - begin : end - begin]
        return self._span.part(offset, length).read()


class Cursor:
    """Reads a span from its start to its end through a small window."""

    def __init__(self, span: Span) -> None:
        self._source, self._end = span.source, span.offset + span.length
        self._window, self._at, self._base = b"", 0, span.offset

    @property
    def position(self) -> int:
        """Offset in the source of the next byte."""
        return self._base + self._at

    @property
    def remaining(self) -> int:
        """Bytes between here and the end."""
        return self._end - self.position

    def byte(self) -> int:
        """The next byte."""
        try:
            found = self._window[self._at]
        except IndexError:
            self._fill(1)
            found = self._window[0]
        self._at += 1
        return found

    def take(self, count: int) -> bytes:
        """The next `count` bytes; small counts only, as they are copied."""
        stop = self._at + count
        if stop > len(self._window):
            self._fill(count)
            stop = count
        data = self._window[self._at : stop]
        self._at = stop
        return data

    def skip(self, count: int) -> Span:
        """The next `count` bytes, without reading them."""
        self.require(count)
        span, position = Span(self._source, self.position, count), self.position + count
        if self._at + count <= len(self._window):
            self._at += count
        else:
            self._window, self._at, self._base = b"", 0, position
        return span

    def line(self) -> bytes:
        """The bytes up to the next newline, which is left out."""
        end = self._window.find(b"\n", self._at, self._at + MAX_LINE_BYTES)
        if end < 0:
            self._fill(min(self.remaining, MAX_LINE_BYTES))
            end = self._window.find(b"\n", 0, MAX_LINE_BYTES)
        if end < 0:
            raise CheckpointError(
                f"{self._source.name}: expected a line of text at byte {self._base},"
                f" found none that ends within {MAX_LINE_BYTES} bytes"
            )
        begin, self._at = self._at, end + 1
        return self._window[begin:end]

    def require(self, count: int) -> None:
        """Refuse a length that goes beyond the end."""
        if count > self.remaining:
            raise CheckpointError(
                f"{self._source.name}: the file is truncated: {count} bytes were expected from"
                f" byte {self.position} on, {self.remaining} are there"
            )

    def _fill(self, count: int) -> None:
        """Let the window begin at the next byte and hold at least `count` bytes."""
        self.require(count)
        position, size = self.position, min(max(count, WINDOW_BYTES), self.remaining)
        self._window = self._source.read(position, size)
        self._at, self._base = 0, position


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino
