"""Blocks of images through two stages, side by side: in threads, or on two streams of a GPU."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

Stage = Callable[[Tensor], Tensor]


class Streams(Protocol):
    """Where the second stage runs, beside the first."""

    def beside(self, made: Tensor) -> AbstractContextManager[None]:
        """Work queued inside follows all that made `made`, and holds up nothing queued later."""
        ...

    def fetch(self, result: Tensor) -> Tensor:
        """A result of the second stage on the CPU, once it is done."""
        ...


class CudaStreams:
    """The current stream for the first stage, one of its own for the second."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def beside(self, made: Tensor) -> Iterator[None]:
        """The side stream, behind what the current one has queued so far."""
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        made.record_stream(self._side)  # or its memory may be taken again too early
        with torch.cuda.stream(self._side):
            yield

    def fetch(self, result: Tensor) -> Tensor:
        """Copied behind what the side stream has queued; the current one goes on meanwhile."""
        with torch.cuda.stream(self._side):
            return result.cpu()


def overlapped(
    makers: Iterable[Callable[[], Tensor]], finish: Stage, streams: Streams
) -> Iterator[Tensor]:
    """finish(make()) for every maker, in order, on the CPU.

    While a block is finished (decoded, features extracted) the next is being made. At most two
    blocks are under way, so that memory does not grow with their number.
    """
    waiting: deque[Tensor] = deque()
    for make in makers:
        made = make()
        with streams.beside(made):
            waiting.append(finish(made))
        if len(waiting) > 1:
            yield streams.fetch(waiting.popleft())
    while waiting:
        yield streams.fetch(waiting.popleft())


@contextlib.contextmanager
def single_threaded(workers: int) -> Iterator[None]:
    """One thread inside each operation while several workers run operations side by side."""
    before = torch.get_num_threads()
    if workers > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def threads(workers: int, blocks: int) -> Iterator[Callable[..., Iterable[Tensor]]]:
    """A map over blocks: in threads where there is a block for each, else one by one.

    Small networks on the CPU lose much of a second core to synchronisation inside operations;
    whole blocks side by side, each on one core, do not.
    """
    if workers < 2 or blocks < workers:
        yield map
        return
    with single_threaded(workers):
        pool = ThreadPoolExecutor(workers)
        try:
            yield pool.map
        finally:
            pool.shutdown(cancel_futures=True)
