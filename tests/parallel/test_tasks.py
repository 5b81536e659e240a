"""Tasks that ranks take one after the other."""

from __future__ import annotations

import threading
from typing import NamedTuple

from merge_rl.errors import ParallelError, StoppedError
from merge_rl.parallel.group import Group
from merge_rl.parallel.rendezvous import Place
from merge_rl.parallel.tasks import TaskQueue
from tests.ranks import on_ranks


class Taken(NamedTuple):
    """What a rank did, and what it heard of others."""

    tasks: list[int]
    heard: list[tuple[int, int]]


def test_a_process_alone_takes_all_in_order() -> None:
    queue = TaskQueue(Group(Place()), "letters", 3)
    assert list(queue) == [0, 1, 2]
    assert list(queue.wait()) == []
    assert queue.news() == []


def test_who_is_free_takes_the_next() -> None:
    others_done = threading.Event()

    def work(group: Group) -> Taken:
        queue, mine = TaskQueue(group, "letters", 5), []
        for task in queue:
            mine.append(task)
            if task == 0:  # lasts until all others are done
                assert others_done.wait(20)
            elif task == 4:
                others_done.set()
        heard = list[tuple[int, int]]()
        for _ in queue.wait():
            heard += queue.news()
        return Taken(mine, heard)

    first, second = on_ranks(2, work)
    assert isinstance(first, Taken)
    assert isinstance(second, Taken)
    slow, quick = (first, second) if 0 in first.tasks else (second, first)
    assert (slow.tasks, quick.tasks) == ([0], [1, 2, 3, 4])
    rank = 1 if slow is first else 0
    assert sorted(slow.heard) == [(task, rank) for task in (1, 2, 3, 4)]
    assert quick.heard == [(0, 1 - rank)]


def test_a_failure_ends_the_tasks_of_all() -> None:
    def work(group: Group) -> None:
        for task in TaskQueue(group, "letters", 10**6):
            if task == 3:
                raise ParallelError("no paper")

    ended = on_ranks(2, work)
    assert sorted(str(each) for each in ended)[0] == "no paper"
    assert all(isinstance(each, (ParallelError, StoppedError)) for each in ended)
