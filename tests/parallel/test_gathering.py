"""Rows of many processes in the first one's memory, and when that memory is used again."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from merge_rl.errors import ParallelError, StoppedError
from merge_rl.parallel import blocks as gathering
from merge_rl.parallel.blocks import Buffers, gather_rows
from merge_rl.parallel.group import Group
from tests.ranks import on_ranks

pytestmark = pytest.mark.numerics

SIZES = [[2, 1], [], [3, 3, 1]]  # rows of the blocks of three ranks, one of them idle


def block(rank: int, tag: int) -> Tensor:
    return torch.arange(SIZES[rank][tag] * 4).reshape(-1, 4) + 100.0 * rank + 10 * tag


@pytest.mark.parametrize("rounds", [1, 3])
def test_rows_arrive_in_the_order_of_ranks_and_blocks(rounds: int) -> None:
    expected = torch.cat([block(r, t) for r in range(3) for t in range(len(SIZES[r]))])

    def work(group: Group) -> list[Tensor]:
        found = []
        for number in range(rounds):
            whole = torch.full((10 if group.leads else 0, 4), torch.nan)
            into = torch.split(whole, [3, 0, 7]) if group.leads else ()
            made = (block(group.rank, t) + number for t in range(len(SIZES[group.rank])))
            gather_rows(group, made, SIZES, into, "rows")
            found.append(whole)
        return found

    first, *_ = on_ranks(3, work)
    assert isinstance(first, list)
    for number, found in enumerate(first):
        assert torch.equal(found, expected + number)


def test_a_rank_that_fails_between_its_blocks_is_named() -> None:
    def made(rank: int) -> Iterator[Tensor]:
        yield torch.ones(2, 4)
        if rank == 1:
            raise ParallelError("lost the second block")
        yield torch.ones(1, 4)

    def work(group: Group) -> None:
        into = torch.split(torch.empty(6, 4), 3)
        gather_rows(group, made(group.rank), [[2, 1], [2, 1]], into, "rows")

    lead, other = on_ranks(2, work)
    assert isinstance(lead, ParallelError)
    assert not isinstance(lead, StoppedError)
    assert "rank 1: lost the second block" in str(lead)
    assert isinstance(other, ParallelError)


def test_rows_on_their_way_outlive_a_group_that_failed() -> None:
    # A thread of the links would turn for ever round rows whose receiver is gone.
    begun = threading.Event()  # a rank that ends earlier breaks the link

    def work(group: Group) -> weakref.ref[Tensor]:
        rows = torch.empty(2, 4)
        if group.leads:
            group.receive(rows, 1, 0)
            group.fail("gave up")
            begun.set()
        assert begun.wait(60)
        return weakref.ref(rows)

    lead, other = on_ranks(2, work)
    gc.collect()
    assert isinstance(lead, weakref.ref)
    assert isinstance(other, weakref.ref)
    assert lead() is not None
    assert other() is None


def test_memory_is_used_again_when_nobody_holds_it() -> None:
    buffers = Buffers()
    first = buffers.take(6, 4)
    place, row = first.data_ptr(), first[2:3]
    row.fill_(7)
    del first
    second = buffers.take(6, 4)  # the row is still held
    assert second.data_ptr() != place
    second.fill_(1)
    assert row.tolist() == [[7.0] * 4]
    del row
    assert buffers.take(3, 8).data_ptr() == place  # of another shape, and as large
    assert buffers.take(2, 4).data_ptr() == place  # and smaller
    assert buffers.take(2, 4).shape == (2, 4)
    # Sums of such rows round as those of rows that torch has made.
    kept = [buffers.take(n, 5) for n in range(1, 40)]
    assert {rows.data_ptr() % gathering.ALIGNED for rows in kept} == {0}
    assert all(torch.empty(n).data_ptr() % gathering.ALIGNED == 0 for n in range(1, 40))


def test_what_is_kept_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "KEPT", 160)
    buffers = Buffers()
    small = buffers.take(5, 4)  # 80 bytes, and 64 to begin where they are aligned
    large = buffers.take(50, 4)
    assert [known.nbytes for known in buffers._known] == [144]
    del small, large
    assert buffers.take(20, 4).shape == (20, 4)
    assert buffers._known == []
