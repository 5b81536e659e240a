"""Ranks that exchange, wait, fail and hang, as threads of one process."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from merge_rl.errors import ConfigError, ParallelError, StoppedError
from merge_rl.parallel import joined
from merge_rl.parallel.group import Group
from merge_rl.parallel.rendezvous import Place, seconds_to_wait
from tests.children import Child
from tests.ranks import on_ranks


def test_the_place_comes_from_the_launcher() -> None:
    assert Place.here({}) == Place()
    told = {
        "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "TORCHELASTIC_RESTART_COUNT": "2",
        "TORCHELASTIC_RUN_ID": "job7",
    }  # fmt: skip
    assert Place.here(told) == Place(rank=3, size=8, local_rank=1, restarts=2, job="job7")
    assert Place.here({"TORCHELASTIC_RUN_ID": "none"}).job is None
    with pytest.raises(ParallelError, match="whole numbers in RANK and WORLD_SIZE"):
        Place.here({"RANK": "first"})


def test_one_process_needs_no_links() -> None:
    with joined() as group:
        assert (group.rank, group.size, group.leads) == (0, 1, True)
        rows = torch.arange(3.0)
        assert group.broadcast({"a": 1}) == {"a": 1}
        gathered = group.gather(rows)
        assert gathered is not None
        assert gathered[0] is rows
        assert group.collect({"b": 2}) == [{"b": 2}]
        group.barrier("end")
        assert group.failure() is None


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_gathered_comes_in_rank_order(size: int) -> None:
    def work(group: Group) -> object:
        # The later the rank, the sooner it is ready.
        time.sleep(0.05 * (size - group.rank))
        rows = torch.full((2, 3), float(group.rank))
        found = group.gather(rows, phase="rows")
        texts = group.collect({"rank": group.rank, "text": "é" * group.rank})
        return None if found is None else ([sorted({*r.flatten().tolist()}) for r in found], texts)

    found = on_ranks(size, work)
    ranks = range(size)
    assert found[0] == ([[float(r)] for r in ranks], [{"rank": r, "text": "é" * r} for r in ranks])
    assert found[1:] == [None] * (size - 1)


def test_documents_arrive_to_the_last_bit() -> None:
    sent = {"x": [0.1, 1 / 3, 5e-324, math.inf], "seed": (1 << 62) - 1, "none": None}

    def work(group: Group) -> object:
        return group.broadcast(sent if group.leads else None)

    assert on_ranks(3, work) == [sent] * 3


def test_a_barrier_names_who_is_missing_and_where() -> None:
    def work(group: Group) -> None:
        if group.rank != 2:
            group.barrier("round 4")
        else:
            time.sleep(0.8)

    found = on_ranks(3, work, timeout=0.4)
    text = "no answer for 0.4 s in the phase 'round 4' from rank 2; MERGERL_TIMEOUT sets how long"
    assert isinstance(found[0], ParallelError)
    assert text in str(found[0])
    assert found[2] is None


def test_a_hung_rank_is_named_with_what_it_was_doing() -> None:
    def work(group: Group) -> None:
        group.note(f"sampling block {group.rank}")
        if group.rank == 1:
            time.sleep(1.2)
            return
        group.gather(torch.zeros(2), phase="round 7")

    found = on_ranks(3, work, timeout=0.5)
    expected = "no answer for 0.5 s in the phase 'round 7' from rank 1 (sampling block 1)"
    assert isinstance(found[0], ParallelError)
    assert expected in str(found[0])


def test_a_silent_leader_is_named() -> None:
    def work(group: Group) -> None:
        if group.leads:
            time.sleep(0.8)
            return
        group.broadcast(phase="waiting for rank 0")

    found = on_ranks(3, work, timeout=0.4)
    expected = (
        "rank 0 has said nothing for 0.4 s in the phase 'waiting for rank 0'; MERGERL_TIMEOUT"
    )
    assert all(str(error).startswith(expected) for error in found[1:])
    # One of those that noticed says so to the user.
    assert sorted(type(error).__name__ for error in found[1:]) == [
        "SilentLeaderError", "StoppedError",
    ]  # fmt: skip


def test_a_failure_reaches_all_and_rank_0_says_it() -> None:
    def work(group: Group) -> None:
        if group.rank == 1:
            raise ConfigError("no room for it")
        group.barrier("round 1")

    began = time.monotonic()
    found = on_ranks(3, work, timeout=30.0)
    assert time.monotonic() - began < 15
    assert type(found[0]) is ParallelError
    assert str(found[0]) == "rank 1: no room for it"
    assert type(found[1]) is ConfigError
    assert isinstance(found[2], StoppedError)  # which prints nothing: rank 0 has said it


WAITS = """
import sys, torch
from merge_rl.errors import ParallelError
from merge_rl.parallel import joined
try:
    with joined() as group:
        group.timeout = 1.0  # that of the links stays
        group.gather(torch.zeros(2), phase="round 1")
except ParallelError as error:
    sys.exit(str(error))
"""


def hang() -> None:
    """What the other rank does."""
    with joined():
        time.sleep(600)


def test_a_process_ends_with_its_error_while_another_hangs(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
        "MERGERL_TIMEOUT": "60",
    }  # fmt: skip
    other = Child(hang, folder=tmp_path / "other", environment={**told, "RANK": "1"})
    try:
        # The links would wait for what is on its way over them for two minutes.
        ended = subprocess.run(
            [sys.executable, "-c", WAITS], env={**told, "RANK": "0"}, capture_output=True,
            text=True, timeout=110,
        )  # fmt: skip
        assert other.poll() is None
        assert ended.returncode == 1
        assert "no answer for 1 s in the phase 'round 1' from rank 1" in ended.stderr
    finally:
        other.kill()


def test_time_in_which_the_machine_stood_still_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock([0.01] * 50 + [100.0] + [0.01] * 2000)
    monkeypatch.setattr("merge_rl.parallel.group.time", clock)
    group = Group(Place(rank=0, size=2, local_rank=0), timeout=5.0)
    waiting = group.waiting("round 1", lambda: [1])
    for _ in range(51):
        next(waiting)
    assert clock.now < 1
    next(waiting)
    assert clock.now > 100  # the pause has begun and ended: there is another look
    with pytest.raises(ParallelError, match="no answer for 5 s in the phase 'round 1' from rank 1"):
        for _ in waiting:
            pass
    # 0.5 s before the pause, 1 s for the pause itself, 3.5 s after it.
    assert clock.now == pytest.approx(0.5 + 100 + 3.5, abs=0.05)


def test_a_patient_wait_begins_anew_when_something_new_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock([0.1] * 200)
    monkeypatch.setattr("merge_rl.parallel.group.time", clock)
    store = dist.HashStore()  # type: ignore[attr-defined]
    group, other = (Group(Place(rank=r, size=2, local_rank=r), store, 5.0) for r in (0, 1))
    waiting = group.waiting("searches", lambda: [1], patient=True)
    for images in range(3):
        other.note(f"{images} images")
        for _ in range(40):
            next(waiting)
    assert clock.now > 2 * 5.0
    with pytest.raises(ParallelError, match=r"no answer for 5 s .* from rank 1 \(2 images\)"):
        for _ in waiting:
            pass
    # Looks are 0.3 s apart; 5 s after the one that saw the last news.
    assert clock.now == pytest.approx(8.0 + 5.0, abs=0.5)


class Clock:
    """A clock of which every sleep takes the next of these seconds."""

    def __init__(self, seconds: list[float]) -> None:
        self.now, self._seconds = 0.0, iter(seconds)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, _seconds: float) -> None:
        self.now += next(self._seconds)


def test_how_long_to_wait() -> None:
    assert seconds_to_wait({}) == 1800
    assert seconds_to_wait({"MERGERL_TIMEOUT": "2.5"}) == 2.5
    for text in ("0", "-1", "soon", "inf", "nan"):
        with pytest.raises(ConfigError, match="expected MERGERL_TIMEOUT in seconds, > 0, got"):
            seconds_to_wait({"MERGERL_TIMEOUT": text})
