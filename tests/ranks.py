"""Several ranks in one process: a thread each, with links over loopback."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch.distributed as dist

from merge_rl.errors import StoppedError
from merge_rl.parallel.group import Group
from merge_rl.parallel.rendezvous import Place

T = TypeVar("T")


def on_ranks(
    size: int, work: Callable[[Group], T], *, timeout: float = 60.0
) -> list[T | BaseException]:
    """What `work` returns, or raises, on each of `size` ranks."""
    store = dist.HashStore()  # type: ignore[attr-defined]

    def run(rank: int) -> T | BaseException:
        group = Group(Place(rank=rank, size=size, local_rank=rank), store, timeout)
        try:
            group.connect()
            return work(group)
        except StoppedError as error:  # another rank has said why
            group.abandon()
            return error
        except BaseException as error:  # noqa: BLE001 (what the test looks at)
            group.fail(str(error))
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
