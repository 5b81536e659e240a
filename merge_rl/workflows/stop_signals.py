"""Ctrl-C and SIGTERM as one interruption, held back while a state is between two others."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While entered, both signals raise KeyboardInterrupt; inside `held` at its end.

    Batch systems send SIGTERM before they kill. Outside of the main thread, where no signal
    arrives, it does nothing.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._holding = self._pending = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._arrived) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _arrived(self, _number: int, _frame: FrameType | None) -> None:
        if not self._holding:
            raise KeyboardInterrupt
        self._pending = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """Run the block to its end; a signal that arrived meanwhile is raised after it.

        Within another held block, at the end of that one.
        """
        within = self._holding
        with self.noted():
            yield
        if self._pending and not within:
            self._pending = False
            raise KeyboardInterrupt

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Run the block to its end; `pending` tells of signals that arrived meanwhile."""
        within, self._holding = self._holding, True
        try:
            yield
        finally:
            self._holding = within

    @property
    def pending(self) -> bool:
        """Whether a signal was held back."""
        return self._pending
