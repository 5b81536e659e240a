"""What a launcher says of this process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from merge_rl.errors import ConfigError, ParallelError

TIMEOUT: Final = 1800.0  # seconds; the variable MERGERL_TIMEOUT sets another


@dataclass(frozen=True)
class Place:
    """What the launcher says of this process; the defaults are those of a process alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarts: int = 0
    job: str | None = None  # the launcher's name for all processes, through restarts

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Place:
        """From the variables that torchrun sets; ParallelError for what is no number."""
        names = {
            "rank": "RANK", "size": "WORLD_SIZE", "local_rank": "LOCAL_RANK",
            "restarts": "TORCHELASTIC_RESTART_COUNT",
        }  # fmt: skip
        try:
            numbers = {k: int(environment[v]) for k, v in names.items() if v in environment}
        except ValueError:
            raise ParallelError("expected whole numbers in RANK and WORLD_SIZE") from None
        job = environment.get("TORCHELASTIC_RUN_ID")
        return cls(**numbers, job=None if job in (None, "", "none") else job)


def seconds_to_wait(environment: Mapping[str, str] = os.environ) -> float:
    """MERGERL_TIMEOUT, or the default; ConfigError for what is no positive number."""
    text = environment.get("MERGERL_TIMEOUT", str(TIMEOUT))
    with suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise ConfigError(f"expected MERGERL_TIMEOUT in seconds, > 0, got {text!r}")
