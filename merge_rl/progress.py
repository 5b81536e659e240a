"""Progress as lines of text: what Python functions print while they work."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, TextIO

from merge_rl.errors import ConfigError
from merge_rl.interfaces import NullTracker, Tracker

EVERY: Final = 10.0  # seconds between two lines on how far a phase is


def counted(count: int, noun: str) -> str:
    """A count and its noun: "1 round", "1,200 rounds"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


LEAST_OF_THREE_DECIMALS: Final = 0.01


def number(value: float | None, form: str = ".3f", like: float | None = None) -> str:
    """Three decimals, or as a format says; words for None and NaN.

    Distances of one's own features may be of any size: three decimals grow to two digits of a
    number below 0.01, or of one of the size of `like`, and to powers of ten below 0.0001.
    """
    if value is None or math.isnan(value):
        return "not finite"
    size = abs(value if like is None else like)
    if form.endswith(".3f") and 0 < size < LEAST_OF_THREE_DECIMALS:
        digits = ".3g" if size < 1e-4 else ".4f" if size >= 1e-3 else ".5f"
        form = form.replace(".3f", digits)
    return format(value, form)


class LineTracker:
    """Prints progress as lines: one for a phase, a round, a note, a warning.

    A `merge_rl.interfaces.Tracker` for any function that takes one, such as
    `optimize(..., tracker=LineTracker(file))`; prints to stderr where no file is given.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file
        self._name, self._total, self._done, self._told = "", 0, 0, 0.0

    def phase(self, name: str, total: int) -> None:
        """Print the phase that begins and its `total` of images."""
        self._name, self._total, self._done, self._told = name, total, 0, time.monotonic()
        self._print(f"{name} ({total:,} images)")

    def advance(self, count: int) -> None:
        """Count images that are done; print the number now and then."""
        self._done += count
        now = time.monotonic()
        if now - self._told >= EVERY and self._done < self._total:
            self._told = now
            self._print(f"{self._name}: {self._done:,} of {self._total:,}")

    def event(self, event: Mapping[str, Any]) -> None:
        """Print a note, a warning, or a round in a few words; other events are not printed."""
        kind = event.get("kind")
        if kind == "note":
            self._print(str(event["text"]))
        elif kind == "warning":
            self._print(f"warning: {event['text']}")
        elif kind == "round":
            self._told = time.monotonic()
            self._print(f"  {round_text(event)}  {event['images']:,} images")
        elif kind == "step" and "pool_fid" in event:
            self._print(f"  step {event['step']}  {pool_text(event, event['pool_fid'])}")

    def _print(self, text: str) -> None:
        file = self._file or sys.stderr
        file.write(f"{text}\n")
        file.flush()


class NoteTracker(NullTracker):
    """Hands notes on, and forgets the rest."""

    def __init__(self, announce: Callable[[str], None]) -> None:
        self._announce = announce

    def event(self, event: Mapping[str, Any]) -> None:
        """Hand a note on."""
        if event.get("kind") == "note":
            self._announce(str(event["text"]))


def notes_of(tracker: Tracker) -> Tracker:
    """A tracker that hands on notes alone: phases would be printed as numbers of images."""
    return NoteTracker(announcing(tracker))


def announcing(tracker: Tracker) -> Callable[[str], None]:
    """A function that hands sentences to `tracker` as notes."""
    return lambda text: tracker.event({"kind": "note", "text": text})


def tracker_of(tracker: Tracker | None, progress: bool) -> Tracker:
    """The tracker that was given, else one that prints, or forgets where `progress` is off.

    Raises ConfigError for what is no tracker.
    """
    if tracker is None:
        return LineTracker() if progress else NullTracker()
    heard = [getattr(tracker, name, None) for name in ("phase", "advance", "event")]
    if isinstance(tracker, type) or not all(map(callable, heard)):
        given: object = tracker
        found = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
        raise ConfigError(f"expected a tracker, with phase, advance and event, got {found}")
    return tracker


def round_text(event: Mapping[str, Any]) -> str:
    """A round of a search in a few words."""
    gap, failed = event.get("gap"), event.get("failed")
    text = f"round {event['round'] + 1}  {level_text(event)}"
    text += "" if gap is None else f"  gap {gap:+.0%}"
    return text + (f"  {failed} failed" if failed else "")


def level_text(event: Mapping[str, Any]) -> str:
    """What a round came to: of rewards without a pool, the best candidate."""
    if event["pool_after"] is not None:
        return pool_text(event, event["pool_after"])
    rewards = [reward for reward in event["rewards"] if reward is not None]
    return f"best candidate {number(-max(rewards))}" if rewards else "no candidate"


def pool_text(event: Mapping[str, Any], distance: float) -> str:
    """The pool's distance by its name; older runs, which do not say it, had FID."""
    return f"pool {event.get('distance', 'FID')} {number(distance)}"


def duration(seconds: float) -> str:
    """90 -> "90 s", 7500 -> "2 h 5 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
