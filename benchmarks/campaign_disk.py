"""A disk that is full from the n-th write on, or a limit in the middle of it, for this process."""

from __future__ import annotations

import builtins
import errno
import io
import os
import pathlib
import resource
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Final

BYTES: Final = "bytes"  # what the line of a site begins with where bytes are written
_NAMES: Final = ("mkdir", "rename", "replace", "symlink", "link")  # that functions of a path have
_PACKAGE: Final = f"{os.sep}merge_rl{os.sep}"


class FullDisk:
    """Counts what takes room on a disk: folders, names, bytes, and forcing them to it; refuses all
    from number `first` on.

    With `cut`, files may grow to the middle of that write and no further (RLIMIT_FSIZE), which is
    then half done. With `sites`, a line is added there for each: bytes or name, and who writes.
    """

    real_write = staticmethod(os.write)  # which never counts

    def __init__(self, first: int | None, sites: Path | None = None, *, cut: bool = False) -> None:
        self.first, self.cut, self.count = first, cut, 0
        self._open = io.open
        self._sites = os.open(sites, os.O_WRONLY | os.O_CREAT, 0o666) if sites else None

    def use(self, *names: Any, at: int | None = None, size: int = 0) -> None:
        """One more, of bytes where it says `at` which place of a file; OSError once it is full,
        which knows the names that the system would.
        """
        number, self.count = self.count, self.count + 1
        if self._sites is not None:
            kind = "name" if at is None else BYTES
            self.real_write(self._sites, f"{kind} {_writer()}\n".encode())
        if self.first is None or number < self.first:
            return
        if not self.cut:
            files = [os.fspath(name) for name in names if isinstance(name, (str, os.PathLike))]
            known = (files[0], None, *files[1:2]) if files else ()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *known)
        if number == self.first and at is not None:
            limit = at + size // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def install(self) -> None:
        """From here on, for all that this process writes by Python's own means."""
        vars(shutil)["_USE_CP_SENDFILE"] = False  # copies by reading and writing
        vars(builtins)["open"] = vars(io)["open"] = self.open
        for name in (*_NAMES, "fsync"):
            setattr(os, name, self._before(getattr(os, name)))
        own = getattr(pathlib, "_NormalAccessor", None)
        if own is not None:  # paths of Python 3.10 keep these functions for themselves
            own.open = staticmethod(self.open)
            for name in _NAMES:
                setattr(own, name, staticmethod(getattr(os, name)))
        os.write, os.pwrite = self._write(os.write), self._write(os.pwrite)

    def _before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def used(*arguments: Any, **options: Any) -> Any:
            self.use(*arguments)
            return function(*arguments, **options)

        return used

    def _write(self, function: Callable[..., int]) -> Callable[..., int]:
        def used(descriptor: int, data: Any, *offset: int) -> int:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                (at,) = offset or (os.lseek(descriptor, 0, os.SEEK_CUR),)
                self.use(at=at, size=memoryview(data).nbytes)
            return function(descriptor, data, *offset)

        return used

    def open(self, file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None,
             errors: str | None = None, newline: str | None = None, closefd: bool = True,
             opener: Any = None) -> Any:  # fmt: skip
        """As `open`, of a file whose writes count."""
        if not set(mode) & set("wax+") or isinstance(file, int):
            return self._open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        self.use(file)
        raw = _Counted(file, mode.replace("b", "").replace("t", ""), opener=opener)
        raw.disk = self
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding, errors, newline)


class _Counted(io.FileIO):
    disk: FullDisk

    def write(self, data: Any) -> int:
        self.disk.use(at=self.tell(), size=memoryview(data).nbytes)
        return super().write(data)


def _writer() -> str:
    """The calls of the package that led here, innermost first."""
    frame: FrameType | None = sys._getframe(2)
    found = []
    while frame is not None:
        name = frame.f_code.co_filename
        if _PACKAGE in name:
            found.append(f"{name.rpartition(_PACKAGE)[2]}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)
