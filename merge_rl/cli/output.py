"""What the user sees: errors, JSON, progress."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, TypeVar

import typer
from rich import markup
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from merge_rl.cli.ranks import leads
from merge_rl.progress import level_text, round_text

JsonFlag = typer.Option("--json", help="One JSON document on stdout; all else on stderr.")


def visible(text: str) -> str:
    """Text from anywhere: what would move a terminal's cursor as Python writes it."""
    return "".join(c if c.isprintable() or c in "\n\xa0" else ascii(c)[1:-1] for c in text)


def escape(text: str) -> str:
    """The same, for rich: without markup."""
    return markup.escape(visible(text))


def complain(sentence: str, *, anyone: bool = False) -> None:
    """One sentence on stderr, by rank 0, or by any where that one hangs."""
    if not leads() and not anyone:
        return
    console = Console(stderr=True, soft_wrap=True, emoji=False, highlight=False)
    console.print(f"[bold red]error:[/] {escape(sentence)}")


def note_unused_gpu(device: str) -> None:
    """Say so where a command works on the CPU of a machine with a GPU."""
    from merge_rl.workflows.rollout import unused_gpu

    if found := unused_gpu(device):
        note(found)


def note(sentence: str) -> None:
    """A line on stderr that a user should see."""
    say(f"[yellow]note:[/] {escape(sentence)}")


def note_all(sentences: Sequence[str]) -> None:
    """A line on stderr for each."""
    for sentence in sentences:
        note(sentence)


def say(text: str) -> None:
    """A line of information on stderr, with rich markup, by rank 0."""
    if leads():
        _print(text, stderr=True)


def tell(text: str) -> None:
    """A line of a result on stdout, without markup."""
    _print(escape(text), stderr=False)


def _print(text: str, *, stderr: bool) -> None:
    """A line; on a terminal it goes on, set in, where it is full, and no word is cut."""
    console = Console(stderr=stderr, soft_wrap=True, emoji=False, highlight=False)
    if not console.is_terminal:
        console.print(text)
        return
    first, *further = console.render_str(text).wrap(console, console.width - 2) or [Text()]
    for line in (first, *(Text("  ").append_text(line) for line in further)):
        console.print(line)


@contextlib.contextmanager
def stoppable(saved: Callable[[], bool], sentence: str) -> Iterator[None]:
    """Ctrl-C inside says what is kept and how to go on, where `saved`, and ends the command.

    An error of the disk, such as a full one, says it too before it ends the command.
    """
    try:
        yield
    except OSError:
        if saved():
            note(sentence)
        raise
    except KeyboardInterrupt:
        if not saved():
            raise
        say(f"stopped; {escape(sentence)}")
        raise typer.Exit(1) from None


def print_json(document: Any) -> None:
    """The one JSON document of --json."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False, default=str) + "\n")


def rate_of(task: Task) -> float | None:
    """Units a second of a phase, over all of it; None in its first second.

    What was there when it began, as `BarTracker.advance` counted it, was not made in it.
    """
    elapsed = task.finished_time if task.finished else task.elapsed
    made = task.completed - task.fields["known"]
    return made / elapsed if elapsed is not None and elapsed >= 1 and made > 0 else None


class _Rate(ProgressColumn):
    """Units a second of the running task."""

    def render(self, task: Task) -> Text:
        rate = rate_of(task)
        return Text(f"{rate:.3g}/s" if rate and rate < 10 else f"{rate:,.0f}/s" if rate else "-/s",
                    style="cyan")  # fmt: skip


class _Left(ProgressColumn):
    """Time until the running task ends."""

    def render(self, task: Task) -> Text:
        rate = rate_of(task)
        if rate is None or task.remaining is None:
            return Text("-:--:--", style="cyan")
        return Text(str(timedelta(seconds=math.ceil(task.remaining / rate))), style="cyan")


KNOWN_SECONDS: Final = 0.05  # what comes so soon after a phase began was there before it
Tracking = TypeVar("Tracking", bound="BarTracker")


class BarTracker:
    """One bar at a time on a terminal; elsewhere a plain line when a phase begins."""

    def __init__(self, *columns: ProgressColumn, quiet: bool) -> None:
        console = Console(stderr=True)
        quiet = quiet or not leads()
        self._live = console.is_terminal and not quiet
        self._quiet, self._task, self._begun = quiet, TaskID(0), 0.0
        self._progress = Progress(*columns, console=console, disable=not self._live)

    def __enter__(self: Tracking) -> Tracking:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._close()
        self._progress.stop()

    def _close(self) -> None:
        """The bar of a phase that is over is full, also where less than was allowed was needed."""
        for task in self._progress.tasks:
            self._progress.update(task.id, total=task.completed or task.total)

    def size_text(self, total: int) -> str:
        """How much a phase takes."""
        return f"{total:,} images"

    def phase(self, name: str, total: int) -> None:
        """Start a bar for the next phase."""
        if self._progress.tasks:
            # One bar at a time: a column is as wide as its widest cell, seen or not.
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(escape(name), total=total, note="", known=0)
        self._begun = time.monotonic()
        if not self._live and not self._quiet:
            say(f"{escape(name)} ({self.size_text(total)})")

    def advance(self, count: int) -> None:
        """Move the bar."""
        if not self._live:
            return
        self._progress.advance(self._task, count)
        if time.monotonic() - self._begun < KNOWN_SECONDS:
            self._progress.update(self._task, known=self._progress.tasks[0].completed)

    def event(self, event: Mapping[str, Any]) -> None:
        """Show a warning, or a note."""
        if event.get("kind") == "warning":
            say(f"[yellow]warning:[/] {escape(str(event['text']))}")
        if event.get("kind") == "note" and not self._quiet:
            say(escape(str(event["text"])))


class ProgressTracker(BarTracker):
    """Images; a round of a search is one plain line on stderr where there is no terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            _Rate(),
            _Left(),
            TextColumn("{task.fields[note]}"),
            quiet=quiet,
        )

    def event(self, event: Mapping[str, Any]) -> None:
        """Show a round's outcome, or a warning."""
        super().event(event)
        if event.get("kind") != "round":
            return
        if self._live:
            note = f"round {event['round'] + 1} {level_text(event)}"
            self._progress.update(self._task, note=note)
        elif not self._quiet:
            took = f"{event['images']:,} images  {event['seconds']:.1f} s"
            say(f"  {round_text(event)}  {took}")


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
