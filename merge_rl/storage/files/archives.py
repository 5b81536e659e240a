"""Zip files from anywhere: a bounded table of contents, a place of its own for every entry."""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, BinaryIO, Final, cast

from merge_rl.untrusted import Refusal, reason

MAX_DIRECTORY: Final = 256 * 2**20  # bytes of a table of contents: three million images
DAMAGE: Final = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError,
    LookupError, NotImplementedError, RuntimeError, OverflowError, OSError,
)  # fmt: skip
"""What the standard library raises for archives and entries that are damaged."""
LOCAL_HEADER: Final = struct.Struct("<4s5H3L2H")
_METHODS: Final = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}


class Archive(zipfile.ZipFile):
    """A zip file, read through what `opener` opens, which is closed with it.

    Entries that overlap, that lie outside, that share a name or have none are refused: readers
    would disagree on what they are, and a few bytes could stand for many.
    """

    def __init__(
        self,
        opener: Callable[[], BinaryIO],
        where: str,
        refusal: Refusal,
        what: str = "zip file",
        max_directory: int = MAX_DIRECTORY,
    ) -> None:
        self._where, self._refusal = where, refusal
        # Opened here: what is made later is finalised later where neither is ever closed.
        self._source = _Bounded(opener(), max_directory)
        self.ends: dict[str, int] = {}
        with reading(where, refusal, what, close=self._source):
            super().__init__(cast(IO[bytes], self._source))
            self._source.limit = None
            self._check()

    def _check(self) -> None:
        end, members = self.start_dir, self.infolist()
        for member in sorted(members, key=lambda member: member.header_offset, reverse=True):
            name = member.orig_filename
            if not member.filename or "\0" in name:
                raise zipfile.BadZipFile(f"an entry has the impossible name {name!r}")
            if name in self.ends:
                raise zipfile.BadZipFile(f"the entry {name!r} is there twice")
            # The extra field of the entry's own header is not known: this is the least it takes.
            least = LOCAL_HEADER.size + len(name) + member.compress_size
            if member.header_offset < 0 or member.header_offset + least > end:
                raise zipfile.BadZipFile(
                    f"the entry {name!r} is not where the table of contents says"
                )
            self.ends[name], end = end, member.header_offset

    def entry(self, member: zipfile.ZipInfo) -> IO[bytes]:
        """An entry opened for reading; refused if it is encrypted or packed in an unusual way.

        Of the ways to pack only deflate can be undone in pieces of bounded size.
        """
        problem = ""
        if member.flag_bits & 1:  # the method of which may be a number of its own, 99
            problem = "encrypted, expected an archive without a password; unpack it first"
        elif member.compress_type not in _METHODS:
            usual = " or ".join(_METHODS.values())
            problem = f"packed by method {member.compress_type}, expected {usual}"
        if problem:
            raise self._refusal(f"{self._where}: {member.filename!r} is {problem}")
        return self.open(member)

    def close(self) -> None:
        """Close the archive and its file."""
        super().close()
        if hasattr(self, "_source"):  # not where nothing could be opened
            self._source.close()


@contextmanager
def reading(
    where: str, refusal: Refusal, what: str, close: _Bounded | None = None
) -> Iterator[None]:
    """Turns what the standard library raises for damage into one sentence."""
    try:
        yield
    except DAMAGE as error:
        if close is not None:
            close.close()
        why = reason(error)
        if why == "File is not a zip file":
            why = "no table of contents at its end: another kind of file, or truncated"
        raise refusal(f"{where}: not a readable {what}: {why}") from None


class _Bounded:
    """A file of which no more than `limit` bytes are read at once, while there is a limit."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file = file
        self.limit: int | None = limit
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def read(self, count: int = -1) -> bytes:
        if self.limit is not None and count > self.limit:
            raise zipfile.BadZipFile(
                f"its table of contents takes {count} bytes, at most {self.limit} are read"
            )
        return self._file.read(count)

    def seekable(self) -> bool:
        return True
