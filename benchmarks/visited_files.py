"""Which files of a package a stretch of a running program visits."""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

Mark = Callable[[FrameType, str], str | None]
"""From a frame of the package and "call" or "return" to the name of the stretch that begins."""

REPORTING = {"phase", "advance", "event"}  # the methods of a Tracker: what they do is not counted


@dataclass
class Stretch:
    """What ran from one mark to the next."""

    name: str
    files: set[str] = field(default_factory=set)  # relative to the package


class Visits:
    """While entered, notes the files of the package below `root` whose functions are entered.

    A new stretch begins whenever `mark` names one; the first is called "begin". Functions count
    in the file of their module, those that dataclasses generate too. Left out is what runs while a
    module of the package is imported, and what runs inside the methods of a tracker, as both
    depend on who calls. Threads that start meanwhile belong to the stretch at hand; marks count
    in the thread that entered.
    """

    def __init__(self, root: Path, mark: Mark) -> None:
        self.root, self.mark = os.path.join(os.fspath(root), ""), mark  # noqa: PTH118
        self.stretches = [Stretch("begin")]
        self._own = threading.local()
        self._main = 0

    def __enter__(self) -> Visits:
        self._main = threading.get_ident()
        threading.setprofile(self._seen)
        sys.setprofile(self._seen)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _seen(self, frame: FrameType, event: str, _argument: Any) -> None:
        if event not in ("call", "return"):
            return
        file = frame.f_globals.get("__file__")
        if not isinstance(file, str) or not file.startswith(self.root):
            return
        is_function = frame.f_code.co_flags & inspect.CO_OPTIMIZED
        quiet = frame.f_code.co_name == "<module>" or (is_function and _reports(frame))
        # A mark at a call counts before, one at a return after what the function itself does.
        if event == "call" and is_function:
            self._begin(frame, event)
            if not quiet and not self._muted:
                self.stretches[-1].files.add(file[len(self.root) :])
        if quiet:
            self._own.muted = self._muted + (1 if event == "call" else -1)
        if event == "return" and is_function:
            self._begin(frame, event)

    @property
    def _muted(self) -> int:
        return getattr(self._own, "muted", 0)

    def _begin(self, frame: FrameType, event: str) -> None:
        if threading.get_ident() != self._main or self._muted:
            return
        name = self.mark(frame, event)
        if name is not None:
            self.stretches.append(Stretch(name))

    def between(self, first: str, last: str) -> set[str]:
        """Files visited from a mark called `first` to the next called `last`; the most, if often.

        A `first` that comes again before a `last` begins anew. Raises LookupError if the marks were
        not passed in this order.
        """
        found, start = [], None
        for index, stretch in enumerate(self.stretches):
            if stretch.name == last and start is not None:
                between = self.stretches[start:index]
                found.append(set().union(*(part.files for part in between)))
                start = None
            if stretch.name == first:
                start = index
        if not found:
            raise LookupError(f"nothing ran from a mark {first!r} to a mark {last!r}")
        return max(found, key=len)


def _reports(frame: FrameType) -> bool:
    """Whether a frame is a method of a tracker, by the names of the Tracker protocol."""
    if frame.f_code.co_name not in REPORTING:
        return False
    owner = type(frame.f_locals.get("self"))
    return all(hasattr(owner, name) for name in REPORTING)


def search_mark(frame: FrameType, event: str) -> str | None:
    """Marks of a search, by the names of the Searcher protocol: "asking", "asked", "told"."""
    name = frame.f_code.co_name
    if "self" not in frame.f_locals:  # such as the function of the terminal that tells something
        return None
    if name == "ask":
        return "asking" if event == "call" else "asked"
    return "told" if name == "tell" and event == "call" else None


def step_mark(frame: FrameType, event: str) -> str | None:
    """Marks of fine-tuning: the kind of every event that a tracker hears of, such as "step"."""
    if event != "call" or frame.f_code.co_name != "event" or not _reports(frame):
        return None
    for value in frame.f_locals.values():
        if isinstance(value, dict) and "kind" in value:
            return str(value["kind"])
    return None
