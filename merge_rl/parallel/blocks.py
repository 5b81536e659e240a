"""Work cut into blocks of images, and blocks shared out, by rules that know no world size.

What falls into one forward pass decides how its sums round. So blocks follow from the work and the
batch limit alone; only who makes them depends on how many there are to make them.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from merge_rl.errors import ConfigError
from merge_rl.parallel.group import Group

PAIR: Final = 50  # images that are worth two blocks


class Block(NamedTuple):
    """Images [start, stop) of work item `item`: what one forward pass makes."""

    item: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Images of the block."""
        return self.stop - self.start


def block_size(count: int, limit: int) -> int:
    """Images of one block: at most `limit`, blocks as even as they go, in pairs of 25 or more.

    The second block of a pair keeps a second core busy.
    """
    if limit < 1:
        raise ConfigError(f"expected at least 1 image a batch, got {limit}")
    blocks = math.ceil(max(count, 1) / limit)
    if count >= PAIR * math.ceil(blocks / 2):
        blocks += blocks % 2
    return math.ceil(max(count, 1) / blocks)


def split_blocks(counts: Sequence[int], limit: int) -> list[Block]:
    """Blocks of items with `counts` images each, in order."""
    blocks = []
    for item, count in enumerate(counts):
        size = block_size(count, limit)
        starts = range(0, count, size)
        blocks += [Block(item, start, min(start + size, count)) for start in starts]
    return blocks


def blocks_of_sizes(sizes: Sequence[int]) -> list[Block]:
    """Neighbouring blocks of one item, of so many images each."""
    blocks, start = [], 0
    for size in sizes:
        blocks.append(Block(0, start, start + size))
        start += size
    return blocks


def share_blocks(blocks: Sequence[Block], parts: int) -> list[range]:
    """For each of `parts` a run of neighbouring blocks, about equal in images; some may be empty.

    A block goes where the middle of its images falls: floor(parts (before + size / 2) / total).
    Neighbours stay together, because each item that is begun costs a merge.
    """
    total, before = sum(block.size for block in blocks), 0
    owners = []
    for block in blocks:
        owners.append(parts * (2 * before + block.size) // (2 * total))
        before += block.size
    return [_run_of(owners, part) for part in range(parts)]


def _run_of(owners: Sequence[int], part: int) -> range:
    first = next((i for i, owner in enumerate(owners) if owner >= part), len(owners))
    last = next((i for i, owner in enumerate(owners) if owner > part), len(owners))
    return range(first, last)


KEPT: Final = 256 * 2**20  # bytes
ALIGNED: Final = 64  # bytes: where memory that torch itself makes begins


def gather_rows(
    group: Group,
    made: Iterable[Tensor],
    sizes: Sequence[Sequence[int]],
    into: Sequence[Tensor],
    phase: str,
) -> None:
    """Fill `into` on rank 0 with the rows of all ranks; a block travels while others are made.

    Args:
        made: this rank's blocks (B, D) float32 on the CPU, in order; gone through once.
        sizes: for each rank the rows of its blocks.
        into: on rank 0 for each rank a contiguous (N, D) of as many rows; elsewhere nothing.
    """
    if not group.leads:
        group.settle([group.send(rows, tag) for tag, rows in enumerate(made)], phase=phase)
        return
    coming = [
        group.receive(part, rank, tag)
        for rank in range(1, group.size)
        for tag, part in enumerate(torch.split(into[rank], list(sizes[rank])))
    ]
    for part, rows in zip(torch.split(into[0], list(sizes[0])), made, strict=True):
        part.copy_(rows)
    group.settle(coming, phase=phase)


class Buffers:
    """A pool of memory for rows: a buffer is reused once no tensor refers to it.

    Fresh memory has to be mapped page by page when it is written, which takes longer than the
    copy. What is kept for later is never more than `KEPT` bytes.
    """

    def __init__(self) -> None:
        self._known: list[np.ndarray[Any, np.dtype[np.float32]]] = []

    def take(self, count: int, dim: int) -> Tensor:
        """An uninitialised tensor (count, dim) float32; its memory is reused once it is gone."""
        size = count * dim
        for i in range(len(self._known)):
            if self._known[i].size >= size + ALIGNED // 4 and self._is_free(i):
                return _aligned(self._known[i], size).view(count, dim)
        # What is too small by now goes.
        self._known = [self._known[i] for i in range(len(self._known)) if not self._is_free(i)]
        made = np.empty(size + ALIGNED // 4, dtype=np.float32)
        if made.nbytes + sum(buffer.nbytes for buffer in self._known) <= KEPT:
            self._known.append(made)
        return _aligned(made, size).view(count, dim)

    def _is_free(self, index: int) -> bool:
        # The list has a reference, and the call another; every array and tensor in it has one.
        return sys.getrefcount(self._known[index]) <= 2


def _aligned(memory: np.ndarray[Any, np.dtype[np.float32]], size: int) -> Tensor:
    """`size` elements of the memory, from where torch would begin.

    Rows that come from others then round in sums as rows that were made here.
    """
    skipped = -memory.ctypes.data % ALIGNED // 4
    return torch.from_numpy(memory[skipped : skipped + size])


class SharedWork:
    """What rank 0 asks all ranks for, until it ends it; blocks of rows are shared out.

    Requests are plain data. Rank 0 asks, the others are in `follow`.

    Args:
        group: the ranks.
        announce: hears once, on rank 0, if there is less work than there are ranks.
    """

    def __init__(self, group: Group, announce: Callable[[str], None] = lambda _text: None) -> None:
        self.group, self._announce, self._told = group, announce, False
        self._buffers = Buffers()

    def ask(self, do: str, phase: str = "", **asked: Any) -> None:
        """On rank 0: what the others do now, at the same time as this one."""
        self.group.broadcast({"do": do, "phase": phase, **asked}, phase=phase or do)

    def end(self, result: Any = None) -> None:
        """On rank 0: dismiss the others; `result`, plain data, is what `follow` returns there."""
        self.ask("end", result=result)

    def follow(self, act: Callable[[Mapping[str, Any]], None]) -> Any:
        """On the other ranks: do what is asked for until rank 0 ends it; its result."""
        while True:
            asked = self.group.broadcast(phase="waiting for rank 0")
            if asked["do"] == "end":
                return asked["result"]
            act(asked)

    def rows(
        self,
        blocks: Sequence[Block],
        dim: int,
        make: Callable[[Sequence[Block]], Iterable[Tensor]],
        phase: str,
        on_rows: Callable[[int], None] = lambda _count: None,
    ) -> Tensor:
        """The rows of all blocks in order, (N, dim) float32, on rank 0; on the others no row.

        Every rank calls it with the same blocks and makes its share: `make` gives the rows
        (B, dim) of one of them after the other. `on_rows` hears of those that others have made.
        """
        shares = share_blocks(blocks, self.group.size)
        mine = [blocks[i] for i in shares[self.group.rank]]
        self.group.note(f"{phase}: {_described(mine)}")
        sizes = [[blocks[i].size for i in share] for share in shares]
        counts = [sum(own) for own in sizes]
        found = self._buffers.take(sum(counts) if self.group.leads else 0, dim)
        into = torch.split(found, counts) if self.group.leads else ()
        gather_rows(self.group, make(mine), sizes, into, phase)
        if self.group.leads:
            on_rows(sum(counts[1:]))
        return found

    def tell_idle(self, blocks: Sequence[Block]) -> None:
        """On rank 0: say once if some ranks have none of these blocks."""
        shares = share_blocks(blocks, self.group.size)
        idle = sum(len(share) == 0 for share in shares)
        if idle and self.group.leads and not self._told:
            self._told = True
            self._announce(
                f"{idle} of {len(shares)} ranks are idle at times: the work has {len(blocks)} "
                f"blocks of up to {max(block.size for block in blocks)} images; a smaller --batch "
                "makes more of them"
            )


def _described(blocks: Sequence[Block]) -> str:
    if not blocks:
        return "no block"
    images = sum(block.size for block in blocks)
    return f"{images} images in {len(blocks)} blocks, first of item {blocks[0].item}"


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
