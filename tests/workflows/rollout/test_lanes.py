"""Two stages side by side: the order of work on streams, told by streams that keep a diary."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from merge_rl.workflows.rollout.execution import overlapped, threads


class Diary:
    """Streams that do everything at once and write down what they were asked."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextlib.contextmanager
    def beside(self, made: Tensor) -> Iterator[None]:
        self.lines.append(f"beside {int(made)}")
        yield

    def fetch(self, result: Tensor) -> Tensor:
        self.lines.append(f"fetch {int(result)}")
        return result


def test_a_block_is_finished_while_the_next_is_made() -> None:
    diary = Diary()

    def maker(i: int) -> Callable[[], Tensor]:
        def make() -> Tensor:
            diary.lines.append(f"make {i}")
            return torch.tensor(i)

        return make

    found = list(overlapped([maker(i) for i in range(3)], lambda x: 10 * x, diary))
    assert [int(x) for x in found] == [0, 10, 20]
    # Block 1 is queued before the host waits for block 0, so that the device never runs dry.
    assert diary.lines == [
        "make 0", "beside 0", "make 1", "beside 1", "fetch 0", "make 2", "beside 2", "fetch 10",
        "fetch 20",
    ]  # fmt: skip
    assert list(overlapped([], lambda x: x, diary)) == []


def test_at_most_two_blocks_are_under_way() -> None:
    diary, alive = Diary(), list[int]()

    def make() -> Tensor:
        alive.append(
            sum("beside" in x for x in diary.lines) - sum("fetch" in x for x in diary.lines)
        )
        return torch.tensor(1)

    assert len(list(overlapped([make] * 6, lambda x: x, diary))) == 6
    assert max(alive) == 1  # beside the one that is being made


@pytest.mark.parametrize(
    ("workers", "blocks", "side_by_side"), [(1, 4, 1), (2, 1, 1), (2, 2, 2), (3, 8, 3)]
)
def test_threads_only_where_each_has_a_block(workers: int, blocks: int, side_by_side: int) -> None:
    before, seen = torch.get_num_threads(), set[str]()
    barrier = threading.Barrier(side_by_side)

    def work(i: int) -> int:
        if i < side_by_side:  # passes only if so many run at the same time
            barrier.wait(5)
        seen.add(threading.current_thread().name)
        return i * i

    with threads(workers, blocks) as run:
        assert list(run(work, range(blocks))) == [i * i for i in range(blocks)]
    assert torch.get_num_threads() == before
    assert len(seen) == side_by_side
