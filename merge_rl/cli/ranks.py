"""The command line on many processes: rank 0 alone talks, the others tell it what went wrong."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Final

from merge_rl.errors import MergeRLError, ParallelError

# Commands that share their work; the others would do the same thing in every process.
PARALLEL_COMMANDS: Final = (
    "optimize", "resume", "compare", "finetune", "evaluate", "reference"
)  # fmt: skip


def launched() -> bool:
    """Whether this process is one of several that torchrun started."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ


def leads() -> bool:
    """Whether this process may talk."""
    return not launched() or os.environ["RANK"] == "0"


class _Silence(io.TextIOBase):
    """Takes text and forgets it."""

    def write(self, text: str) -> int:
        return len(text)


def quiet_followers() -> None:
    """All but rank 0 print nothing on stdout."""
    if not leads():
        sys.stdout = _Silence()


def require_parallel(command: str | None) -> None:
    """Raise ParallelError for a command that one process does."""
    if launched() and command is not None and command not in PARALLEL_COMMANDS:
        raise ParallelError(
            f"{command} works in one process, got {os.environ['WORLD_SIZE']}; start it without "
            f"torchrun (which is for {', '.join(PARALLEL_COMMANDS)})"
        )


def own_device(device: str) -> str:
    """The device of this process: "cuda" is another GPU in each."""
    if not launched():
        return device
    from merge_rl.parallel.rendezvous import Place
    from merge_rl.workflows.rollout import own_device as own

    return own(device, Place.here())


def tell(sentence: str) -> None:
    """Let rank 0 know why this process ends, so that it can say so and none waits for the other."""
    if not launched():
        return
    from merge_rl import parallel

    with suppress(MergeRLError):
        place = parallel.Place.here()
        timeout = min(parallel.seconds_to_wait(), 10.0)
        parallel.Group(place, parallel.open_store(place, timeout), timeout).fail(sentence)


def told() -> str | None:
    """What another rank said before it ended, if one did."""
    if not launched():
        return None
    from merge_rl import parallel

    with suppress(MergeRLError):
        place = parallel.Place.here()
        timeout = min(parallel.seconds_to_wait(), 10.0)
        return parallel.Group(place, parallel.open_store(place, timeout), timeout).failure()
    return None
