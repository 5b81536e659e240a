"""Work cut into blocks of images, and blocks shared out, by rules that know no world size.

What falls into one forward pass decides how its sums round. So blocks follow from the work and the
batch limit alone; only who makes them depends on how many there are to make them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from merge_rl.errors import ConfigError

PAIR: Final = 50  # images from which an item is worth two blocks


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
    """Images of one block: at most `limit`, blocks as even as they go, two where that leaves 25.

    The second block keeps a second core busy.
    """
    if limit < 1:
        raise ConfigError(f"expected at least 1 image a batch, got {limit}")
    least = 2 if count >= PAIR else 1
    return math.ceil(max(count, 1) / max(math.ceil(count / limit), least))


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
