"""Rows that many processes make, in the first one's memory, without a copy on the way."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from merge_rl.parallel import Group

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
    """Memory for rows, given out again once nobody holds anything that lies in it.

    Fresh memory has to be mapped page by page when it is written, which takes longer than the
    copy. What is kept for later is never more than `KEPT` bytes.
    """

    def __init__(self) -> None:
        self._known: list[np.ndarray[Any, np.dtype[np.float32]]] = []

    def take(self, count: int, dim: int) -> Tensor:
        """(count, dim) float32 of any values; all that is known of the memory hangs on it."""
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
