"""Progress in bytes: downloads and conversions."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from merge_rl.cli.output import say


def byte_text(count: int) -> str:
    """1234567 -> "1.2 MB"."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


class ByteTracker:
    """Bars of bytes on a terminal; elsewhere a plain line when a phase begins."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._live, self._task = console.is_terminal, TaskID(0)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )

    def __enter__(self) -> ByteTracker:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def phase(self, name: str, total: int) -> None:
        """Start a bar for the next file, or its conversion."""
        if self._progress.tasks:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(escape(name), total=total)
        if not self._live:
            say(f"{escape(name)} ({byte_text(total)})")

    def advance(self, count: int) -> None:
        """Move the bar."""
        self._progress.advance(self._task, count)

    def event(self, event: Mapping[str, Any]) -> None:
        """Show a warning."""
        if event.get("kind") == "warning":
            say(f"[yellow]warning:[/] {escape(str(event['text']))}")
