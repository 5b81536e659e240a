"""Rank, world size, and the few exchanges between ranks: one process, or many by torchrun.

Rank 0 leads: it asks, the others answer, and what they answer comes in rank order. Messages are
plain JSON and tensors of features, never pickles, and go through host memory (gloo) on every kind
of device: features are needed there, and a round's fit into a few MB.

Nothing here can hang. Every wait looks for the failures of others, can be interrupted, and ends
after `timeout` seconds with the ranks that were waited for and what each was doing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from merge_rl.errors import ConfigError, MergeRLError, ParallelError, StoppedError

TIMEOUT: Final = 1800.0  # seconds; the variable MERGERL_TIMEOUT sets another
PAUSE: Final = (1e-4, 5e-3)  # between two looks at an exchange: first, longest
LOOK_SECONDS: Final = 0.25  # how often a waiting rank looks for failures of others
GRACE: Final = 3.0  # seconds that a lost rank's last words may take


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


class Group:
    """Ranks that work together: 0 leads, the others follow.

    Args:
        place: this process's rank and the world size.
        store: shared by all ranks: phases, failures, barriers.
        timeout: seconds that any wait may take.
    """

    def __init__(self, place: Place, store: Store | None = None, timeout: float = TIMEOUT) -> None:
        self.place, self.timeout = place, timeout
        self.rank, self.size = place.rank, place.size
        self._store = store
        self._links: Any = None  # torch's stubs know half of what it can do
        self._barriers = 0

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which alone talks and writes."""
        return self.rank == 0

    def connect(self) -> None:
        """Wait until every rank is here, then open the links between them."""
        if self._store is None or self.size == 1:
            return
        self.barrier("start")
        # Our own clock ends a wait before gloo's does: it can say who is missing.
        slack = timedelta(seconds=self.timeout + 60)
        links = dist.PrefixStore("links", self._store)  # type: ignore[attr-defined,arg-type]
        self._links = dist.ProcessGroupGloo(links, self.rank, self.size, slack)

    def note(self, doing: str) -> None:
        """Say what this rank is doing, for the message of whoever waits for it in vain."""
        if self._store is not None:
            self._store.set(f"doing/{self.rank}", doing)

    def barrier(self, phase: str) -> None:
        """Return when all ranks are here; ParallelError names those that are not in time."""
        if self._store is None or self.size == 1:
            return
        self._barriers += 1
        name = f"barrier/{self._barriers}"
        self._store.set(f"{name}/{self.rank}", phase)
        arrived = self._store.add(name, 1)
        until, pause = time.monotonic() + self.timeout, PAUSE[0]
        while arrived < self.size:
            time.sleep(pause)
            pause = min(2 * pause, PAUSE[1])
            self._look()
            arrived = self._store.add(name, 0)
            if time.monotonic() > until and arrived < self.size:
                away = [r for r in range(self.size) if not self._has(f"{name}/{r}")]
                raise ParallelError(self._late(away, phase))

    def broadcast(self, document: Any = None, *, phase: str = "") -> Any:
        """Rank 0's document (what JSON can say; floats are exact) on every rank."""
        if self._links is None:
            return document
        data = torch.empty(0, dtype=torch.uint8)
        if self.leads:
            data = torch.frombuffer(bytearray(json.dumps(document).encode()), dtype=torch.uint8)
        length = torch.tensor([len(data)])
        self._wait(self._links.broadcast(length, 0), phase)
        if not self.leads:
            data = torch.empty(int(length), dtype=torch.uint8)
        self._wait(self._links.broadcast(data, 0), phase)
        return json.loads(data.numpy().tobytes())

    def gather(self, rows: Tensor, *, phase: str = "") -> list[Tensor] | None:
        """Every rank's tensor on rank 0, in rank order; None on the others. Equal shapes."""
        if self._links is None:
            return [rows]
        rows = rows.contiguous()
        found = [torch.empty_like(rows) for _ in range(self.size)] if self.leads else []
        self.note(f"{DONE}{phase}")
        self._wait(self._links.gather(found, rows, 0), phase)
        return found if self.leads else None

    def collect(self, document: Any, *, phase: str = "") -> list[Any] | None:
        """Every rank's document on rank 0, in rank order; None on the others."""
        text = json.dumps(document).encode()
        lengths = self.gather(torch.tensor([len(text)]), phase=phase)
        longest = self.broadcast(lengths and max(int(n) for n in lengths), phase=phase)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        found = self.gather(padded, phase=phase)
        if found is None or lengths is None:
            return None
        pairs = zip(found, lengths, strict=True)
        return [json.loads(data[: int(n)].numpy().tobytes()) for data, n in pairs]

    def fail(self, sentence: str) -> None:
        """Tell the others that this rank has failed; the first sentence of a rank stands."""
        if self._store is None or self.size == 1 or self._has(f"failure/{self.rank}"):
            return
        with suppress(RuntimeError):  # the store may be gone by now
            self._store.set(f"failure/{self.rank}", sentence)
            self._store.add("failures", 1)

    def failure(self) -> str | None:
        """What the failed rank of the lowest number said, on rank 0; elsewhere only that it did."""
        if self._store is None or self.size == 1 or self._store.add("failures", 0) == 0:
            return None
        for rank in range(self.size):
            if rank != self.rank and self._has(f"failure/{rank}"):
                return f"rank {rank}: {self._store.get(f'failure/{rank}').decode()}"
        return None

    def _look(self) -> None:
        """Raise if another rank has failed."""
        sentence = self.failure()
        if sentence is not None:
            raise (ParallelError if self.leads else StoppedError)(sentence)

    def _wait(self, work: dist.Work, phase: str) -> None:
        began = looked = time.monotonic()
        pause = PAUSE[0]
        while not work.is_completed():
            time.sleep(pause)
            pause, now = min(2 * pause, PAUSE[1]), time.monotonic()
            if now - looked > LOOK_SECONDS:
                looked = now
                self._look()
            if now - began > self.timeout:
                raise ParallelError(self._late(self._busy(), phase))
        try:
            work.wait()
        except RuntimeError:
            self._lost(phase)

    def _lost(self, phase: str) -> None:
        """A link broke: whoever was at its other end may have left a word."""
        until = time.monotonic() + GRACE
        while time.monotonic() < until:
            self._look()
            time.sleep(PAUSE[1])
        if not self.leads:
            raise StoppedError(f"rank 0 is gone{_during(phase)}")
        missing = self._listed(self._busy())
        raise ParallelError(f"a rank is gone{_during(phase)}; not finished: {missing}")

    def _late(self, ranks: list[int], phase: str) -> str:
        if not self.leads and ranks == [0]:
            return f"rank 0 has said nothing for {self.timeout:g} s{_during(phase)}"
        return (
            f"no answer for {self.timeout:g} s{_during(phase)} from {self._listed(ranks)}; "
            "MERGERL_TIMEOUT sets how long to wait"
        )

    def _busy(self) -> list[int]:
        """On rank 0 the ranks whose last word is not that they were done; elsewhere rank 0."""
        others = range(1, self.size) if self.leads else [0]
        return [r for r in others if not self._doing(r).startswith(DONE)] or list(others)

    def _doing(self, rank: int) -> str:
        if self._store is None or not self._has(f"doing/{rank}"):
            return ""
        return self._store.get(f"doing/{rank}").decode()

    def _listed(self, ranks: list[int]) -> str:
        said = ((rank, self._doing(rank)) for rank in ranks)
        return ", ".join(f"rank {rank}" + (f" ({text})" if text else "") for rank, text in said)

    def _has(self, key: str) -> bool:
        return self._store is not None and bool(self._store.check([key]))


DONE: Final = "done: "


def _during(phase: str) -> str:
    return f" in the phase {phase!r}" if phase else ""


def seconds_to_wait(environment: Mapping[str, str] = os.environ) -> float:
    """MERGERL_TIMEOUT, or the default; ConfigError for what is no positive number."""
    text = environment.get("MERGERL_TIMEOUT", str(TIMEOUT))
    with suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise ConfigError(f"expected MERGERL_TIMEOUT in seconds, > 0, got {text!r}")


def open_store(place: Place, timeout: float) -> Store:
    """The store of the launcher at MASTER_ADDR and MASTER_PORT."""
    try:
        limit = timedelta(seconds=timeout)
        found = next(rendezvous("env://", place.rank, place.size, timeout=limit))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ParallelError(f"rank {place.rank} cannot reach the other ranks: {reason}") from None
    store: Store = dist.PrefixStore("merge_rl", found[0])  # type: ignore[attr-defined]
    return store


@contextmanager
def joined() -> Iterator[Group]:
    """The group of all processes of this launch; of one where there is no launcher.

    An error that leaves the block is told to the other ranks, so that none waits for this one.
    """
    place = Place.here()
    if place.size == 1:
        yield Group(place)
        return
    timeout = seconds_to_wait()
    group = Group(place, open_store(place, timeout), timeout)
    try:
        group.connect()
        yield group
    except BaseException as error:
        group.fail(" ".join(str(error).split()) if isinstance(error, MergeRLError) else
                   f"{type(error).__name__}: {error}")  # fmt: skip
        raise
