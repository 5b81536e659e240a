"""Progress in bytes: downloads and conversions."""

from __future__ import annotations

from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from merge_rl.cli.output import BarTracker


def byte_text(count: int) -> str:
    """1234567 -> "1.2 MB"."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


class ByteTracker(BarTracker):
    """Bytes, and how fast they come."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            quiet=quiet,
        )

    def size_text(self, total: int) -> str:
        """As people write sizes."""
        return byte_text(total)
