"""A queue of long tasks: each is done by one rank, and the first free rank takes the next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from merge_rl.parallel.group import Group
from merge_rl.parallel.rendezvous import Store

TAKEN: Final = "next"  # counts tasks that are taken
DONE: Final = "done"  # counts those that are done


class Finished(NamedTuple):
    """A task that is done, and by which rank."""

    task: int
    rank: int


class TaskQueue:
    """Tasks 0 to `count` - 1, taken in order by all ranks of a group; a process alone takes all.

    Who does what follows from how long tasks take: what comes of a task must not depend on it. All
    ranks make their queues in the same order.
    """

    def __init__(self, group: Group, name: str, count: int) -> None:
        self._group, self._name, self.count = group, name, count
        alone = group.size == 1
        self._store: Store | None = None if alone else group.store_of(f"tasks/{name}")
        self._told: set[int] = set()

    def __iter__(self) -> Iterator[int]:
        """The tasks of this rank, each taken when the one before it is done."""
        if self._store is None:
            yield from range(self.count)
            return
        while True:
            self._group.look()  # a rank that failed ends this for all
            task = self._store.add(TAKEN, 1) - 1
            if task >= self.count:
                return
            self._store.set(f"taken/{task}", str(self._group.rank))
            yield task
            self._store.set(f"done/{task}", str(self._group.rank))
            self._store.add(DONE, 1)

    def news(self) -> list[Finished]:
        """Tasks that others have finished since this was asked last."""
        if self._store is None:
            return []
        found = []
        for task in range(self.count):
            if task not in self._told and self._store.check([f"done/{task}"]):
                self._told.add(task)
                found.append(Finished(task, int(self._store.get(f"done/{task}"))))
        return [each for each in found if each.rank != self._group.rank]

    def wait(self) -> Iterator[None]:
        """Wait for all tasks, yielding after each; ranks without news by the timeout are late."""
        store, known = self._store, 0
        if store is None:
            return
        for _ in self._group.waiting(self._name, self._away, patient=True):
            done = store.add(DONE, 0)
            if done > known:
                known = done
                yield
            if done == self.count:
                return

    def _away(self) -> list[int]:
        """The ranks that are at a task."""
        if self._store is None:
            return []
        taken = [task for task in range(self.count) if self._store.check([f"taken/{task}"])]
        open_tasks = (task for task in taken if not self._store.check([f"done/{task}"]))
        return sorted({int(self._store.get(f"taken/{task}")) for task in open_tasks})
