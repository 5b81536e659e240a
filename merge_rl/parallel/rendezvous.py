"""The store that all ranks share, and how a set of processes finds itself in it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Protocol

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from merge_rl.errors import ConfigError, ParallelError


class Store(Protocol):
    """What torch's stores (of a launcher, in memory) can do; every call is atomic."""

    def set(self, key: str, value: str, /) -> None:
        """Set a key."""
        ...

    def get(self, key: str, /) -> bytes:
        """The value of a key."""
        ...

    def add(self, key: str, amount: int, /) -> int:
        """Raise a counter, which begins at 0; its new value."""
        ...

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys are set."""
        ...


def prefixed(name: str, store: Store) -> Store:
    """The same store, with a name before every key."""
    made: Store = dist.PrefixStore(name, store)  # type: ignore[attr-defined,arg-type]
    return made


def open_store(place: Place, timeout: float) -> Store:
    """The store of the launcher at MASTER_ADDR and MASTER_PORT."""
    try:
        limit = timedelta(seconds=timeout)
        found = next(rendezvous("env://", place.rank, place.size, timeout=limit))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ParallelError(f"rank {place.rank} cannot reach the other ranks: {reason}") from None
    # Not by the number of restarts: launchers on several machines count their own.
    return prefixed("merge_rl", found[0])


Waiting = Callable[[Callable[[], list[int]]], Iterable[None]]
"""Looks to take until something has happened; given who is waited for, for the message."""


def welcome(store: Store, size: int, waiting: Waiting) -> str:
    """On rank 0: a name for what this set of processes writes, told to each of the others.

    A launcher's store outlives processes that it restarts. So that nothing is taken for news that
    an earlier set left there, rank 0 draws a name, and answers each process under a number that
    this process has drawn.
    """
    token, answered = secrets.token_hex(8), set[str]()

    def away() -> list[int]:
        return [r for r in range(1, size) if not store.check([f"{token}/here/{r}"])]

    for _ in waiting(away):
        missing = away()
        if not missing:
            break
        for name in (f"hello/{r}" for r in missing):
            number = store.get(name).decode() if store.check([name]) else ""
            if number and number not in answered:
                store.set(f"welcome/{number}", token)
                answered.add(number)
    return token


def greet(store: Store, rank: int, waiting: Waiting) -> str:
    """On the others: the name that rank 0 has drawn."""
    own = secrets.token_hex(8)
    store.set(f"hello/{rank}", own)
    for _ in waiting(lambda: [0]):
        if store.check([f"welcome/{own}"]):
            break
    token = store.get(f"welcome/{own}").decode()
    store.set(f"{token}/here/{rank}", "")
    return token


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


def is_broken_link(error: RuntimeError) -> bool:
    """Whether an exchange has failed because of the process at its other end."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
