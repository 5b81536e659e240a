"""The few exchanges between ranks: documents, rows, barriers, failures."""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, Final, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from merge_rl.errors import ParallelError, SilentLeaderError, StoppedError
from merge_rl.parallel.rendezvous import TIMEOUT, Place, Store, greet, prefixed, welcome

PAUSE: Final = (1e-4, 5e-3)  # between two looks at an exchange: shortest, longest
PATIENCE: Final = 1 / 16  # of the time waited so far: a pause, between these two
LOOK_SECONDS: Final = 0.25  # how often a waiting rank looks for failures of others
STOOD_SECONDS: Final = 1.0  # a longer gap between two looks: the machine was suspended
START_SECONDS: Final = 300.0  # that processes of one launch may start apart, at most
GRACE: Final = 3.0  # seconds to wait for the last note of a lost rank
HINT: Final = "; MERGERL_TIMEOUT sets how long to wait"
DONE: Final = "done: "  # before the phase in which a rank has finished


class Transfer(NamedTuple):
    """Rows on their way, and what tells when they are there."""

    work: dist.Work
    rows: Tensor  # kept until then


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
        self._begun: list[Transfer] = []  # and not settled yet
        self._abandoned = self._met = False  # met: this set of processes has found itself
        self._barriers = 0

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which alone talks and writes."""
        return self.rank == 0

    def connect(self) -> None:
        """Wait until every rank is here, then open the links between them."""
        if self._store is None or self.size == 1:
            return
        self._store.set(f"early/{self.rank}", "")  # nothing of a process before this one counts
        waiting = partial(self.waiting, "start")
        if self.leads:
            token = welcome(self._store, self.size, waiting)
        else:
            token = greet(self._store, self.rank, waiting)
        self._store, self._met = prefixed(token, self._store), True
        # Our own clock ends a wait before gloo's does: it can say who is missing.
        slack = timedelta(seconds=self.timeout + 60)
        links: Any = prefixed("links", self._store)
        try:
            self._links = dist.ProcessGroupGloo(links, self.rank, self.size, slack)
        except RuntimeError:
            self.lost("start")

    def waiting(
        self, phase: str, away: Callable[[], list[int]], *, patient: bool = False
    ) -> Iterator[None]:
        """Poll a condition until it holds; raise if a rank has failed, or at the timeout."""
        seconds = self.timeout if self._met else min(self.timeout, START_SECONDS)
        said, waited, looked = "", 0.0, time.monotonic()
        now = looked
        while True:
            yield
            time.sleep(min(max(PATIENCE * waited, PAUSE[0]), PAUSE[1]))
            before, now = now, time.monotonic()
            waited += min(now - before, STOOD_SECONDS)
            if now - looked > LOOK_SECONDS:
                looked = now
                self.look()
                # The timeout starts again with every note of a rank that is at work.
                if patient and (news := self._listed(away())) != said:
                    said, waited = news, 0.0
            if waited > seconds:
                raise self._late(away(), phase, seconds)

    def note(self, doing: str) -> None:
        """Record what this rank is doing, for the message of a rank whose wait for it times out."""
        if self._store is not None:
            self._store.set(f"doing/{self.rank}", doing)

    def barrier(self, phase: str) -> None:
        """Return when all ranks are here; ParallelError names those that are not in time."""
        if self._store is None or self.size == 1:
            return
        self._barriers += 1
        name = f"barrier/{self._barriers}"
        self._store.set(f"{name}/{self.rank}", phase)
        self._store.add(name, 1)

        def away() -> list[int]:
            return [r for r in range(self.size) if not self._has(f"{name}/{r}")]

        for _ in self.waiting(phase, away):
            if self._store.add(name, 0) == self.size:
                return

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
        # As lists: PyTorch 2.6 refuses ranks that gather nothing where rows are given alone.
        self._wait(self._links.gather([found] if found else [], [rows]), phase)
        return found if self.leads else None

    def send(self, rows: Tensor, tag: int) -> Transfer:
        """Begin to send rows to rank 0; they must not change before `settle`."""
        rows = rows.contiguous()
        self._begun.append(Transfer(self._links.send([rows], 0, tag), rows))
        return self._begun[-1]

    def receive(self, rows: Tensor, rank: int, tag: int) -> Transfer:
        """Begin to receive into contiguous rows what another rank sends rank 0 under this tag."""
        self._begun.append(Transfer(self._links.recv([rows], rank, tag), rows))
        return self._begun[-1]

    def settle(self, transfers: Sequence[Transfer], *, phase: str = "") -> None:
        """Return when all that ranks send to rank 0 has arrived; all ranks must call it.

        Links keep order: what follows the rows has arrived after them.
        """
        self.gather(torch.zeros(1), phase=phase)
        for transfer in transfers:
            try:
                transfer.work.wait()
            except RuntimeError:
                self.lost(phase)
        settled = {id(transfer) for transfer in transfers}
        self._begun = [transfer for transfer in self._begun if id(transfer) not in settled]

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
        """Tell the others that this rank has failed, and why; only the first reason is kept."""
        self.abandon()
        if self._store is None or self.size == 1:
            return
        with suppress(RuntimeError):  # the store may be gone by now
            if not self._met:
                self._store.set(f"early/{self.rank}", sentence)
            elif not self._has(f"failure/{self.rank}"):
                self._store.set(f"failure/{self.rank}", sentence)
                self._store.add("failures", 1)

    def abandon(self) -> None:
        """Let the links be until the process ends, with whatever is still on its way over them.

        Their destructor waits up to the timeout and a minute, and no Python runs meanwhile. Rows
        for a receiver that is gone would keep a thread busy: they stay too.
        """
        if self._links is not None and not self._abandoned:
            self._abandoned = True
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._links))
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._begun))

    def failure(self) -> str | None:
        """What the failed rank of the lowest number said; None if none has failed.

        Before all ranks have met, what one of them may have said that came no further.
        """
        if self._store is None or self.size == 1:
            return None
        if self._met and self._store.add("failures", 0) == 0:
            return None
        kind = "failure" if self._met else "early"
        for rank in range(self.size):
            name = f"{kind}/{rank}"
            text = self._store.get(name).decode() if rank != self.rank and self._has(name) else ""
            if text:
                return f"rank {rank}: {text}"
        return None

    def store_of(self, name: str) -> Store:
        """A part of the shared store that this set of processes has to itself, for links of others.

        ParallelError for a process alone, which shares nothing.
        """
        if self._store is None:
            raise ParallelError("expected several processes, got one")
        return prefixed(name, self._store)

    def ask_to_stop(self) -> None:
        """Let rank 0 know that this process was told to stop."""
        if self._store is not None:
            self._store.set("stop", "")

    @property
    def asked_to_stop(self) -> bool:
        """Whether some rank was told to stop."""
        return self._has("stop")

    def look(self) -> None:
        """Raise if another rank has failed since `connect`."""
        sentence = self.failure() if self._met else None
        if sentence is not None:
            self.abandon()
            raise (ParallelError if self.leads else StoppedError)(sentence)

    def _wait(self, work: dist.Work, phase: str) -> None:
        for _ in self.waiting(phase, self._busy):
            if work.is_completed():
                break
        try:
            work.wait()
        except RuntimeError:
            self.lost(phase)

    def lost(self, phase: str) -> NoReturn:
        """Raise for a connection that broke, with what the rank at its other end noted last."""
        for _ in range(round(GRACE / PAUSE[1])):
            self.look()
            time.sleep(PAUSE[1])
        if not self.leads:
            raise self._without_leader(f"rank 0 is gone, or hangs{_during(phase)}")
        told = f"a rank is gone, or hangs{_during(phase)}; not finished: "
        raise ParallelError(told + self._listed(self._busy()))

    def _late(self, ranks: list[int], phase: str, seconds: float) -> ParallelError:
        during = f" for {seconds:g} s{_during(phase)}"
        if not self.leads and ranks == [0]:
            return self._without_leader(f"rank 0 has said nothing{during}{HINT}")
        end = f", and {said}" if (said := self.failure()) else HINT
        return ParallelError(f"no answer{during} from {self._listed(ranks)}{end}")

    def _without_leader(self, told: str) -> ParallelError:
        """Of all that notice, the first says so."""
        first = self._store is not None and self._store.add("silent", 1) == 1
        return (SilentLeaderError if first else StoppedError)(told)

    def _busy(self) -> list[int]:
        """On rank 0 the ranks whose last word is not that they were done; elsewhere rank 0."""
        others = range(1, self.size) if self.leads else [0]
        return [r for r in others if not self._doing(r).startswith(DONE)] or list(others)

    def _doing(self, rank: int) -> str:
        key = f"doing/{rank}"
        return self._store.get(key).decode() if self._store and self._has(key) else ""

    def _listed(self, ranks: list[int]) -> str:
        said = ((rank, self._doing(rank)) for rank in ranks)
        return ", ".join(f"rank {rank}" + (f" ({text})" if text else "") for rank, text in said)

    def _has(self, key: str) -> bool:
        return self._store is not None and bool(self._store.check([key]))


def _during(phase: str) -> str:
    return f" in the phase {phase!r}" if phase else ""
