"""A disk that is full from the n-th write on, for this process."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


class FullDisk:
    """Counts what takes room on a disk: folders, names, bytes; refuses all from a number on.

    With `count_in`, nothing is refused, and the number is written there as it grows.
    """

    real_write = staticmethod(os.write)  # which never counts

    def __init__(self, first: int | None, count_in: Path | None) -> None:
        self.first, self.count_in, self.count = first, count_in, 0
        self._open = io.open

    def use(self, *names: Any) -> None:
        """One more; OSError once it is full, which knows the names that the system would."""
        number, self.count = self.count, self.count + 1
        if self.first is not None and number >= self.first:
            files = [os.fspath(name) for name in names if isinstance(name, (str, os.PathLike))]
            known = (files[0], None, *files[1:2]) if files else ()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *known)
        if self.count_in is not None:
            with self._open(self.count_in, "w") as file:
                file.write(str(self.count))

    def install(self) -> None:
        """From here on, for all that this process writes by Python's own means."""
        vars(shutil)["_USE_CP_SENDFILE"] = False  # copies by reading and writing
        vars(builtins)["open"] = vars(io)["open"] = self.open
        for name in ("mkdir", "rename", "replace", "write", "pwrite", "symlink", "link"):
            setattr(os, name, self._before(getattr(os, name)))

    def _before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def used(*arguments: Any, **options: Any) -> Any:
            self.use(*arguments)
            return function(*arguments, **options)

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
        self.disk.use()
        return super().write(data)
