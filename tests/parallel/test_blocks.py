"""Work in blocks: what falls into one forward pass, and who makes it."""

from __future__ import annotations

import pytest

from merge_rl.errors import ConfigError
from merge_rl.parallel.blocks import Block, block_size, share_blocks, split_blocks


@pytest.mark.parametrize(
    ("count", "limit", "size"),
    [
        (0, 250, 1), (1, 250, 1), (7, 3, 3), (8, 3, 3), (49, 250, 49), (50, 250, 25),
        (99, 40, 33), (100, 40, 25), (512, 250, 128), (1000, 250, 250), (1001, 250, 167), (5, 1, 1),
    ],
)  # fmt: skip
def test_blocks_are_even_and_within_the_limit(count: int, limit: int, size: int) -> None:
    # 512 images at most 250 at once: an even number of blocks, so four of 128, not 250, 250 and 12.
    assert block_size(count, limit) == size
    sizes = [block.size for block in split_blocks([count], limit)]
    assert sum(sizes) == count
    assert all(0 < s <= limit for s in sizes)
    assert max(sizes, default=1) == min(size, max(count, 1))


def test_blocks_of_several_items() -> None:
    expected = [Block(0, 0, 2), Block(0, 2, 3), Block(2, 0, 1)]
    assert split_blocks([3, 0, 1], 2) == expected
    with pytest.raises(ConfigError, match="at least 1 image a batch, got 0"):
        split_blocks([3], 0)


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("counts", [[100] * 16, [1000], [3, 1, 250, 7], [1]])
def test_shares_are_neighbours_and_cover_everything(counts: list[int], parts: int) -> None:
    blocks = split_blocks(counts, 40)
    shares = share_blocks(blocks, parts)
    assert len(shares) == parts
    assert [i for share in shares for i in share] == list(range(len(blocks)))
    images = [sum(blocks[i].size for i in share) for share in shares]
    # No share is further from the even one than a block is large.
    assert max(images) <= sum(counts) / parts + max(block.size for block in blocks)


def test_equal_blocks_are_shared_evenly() -> None:
    blocks = split_blocks([50] * 16, 25)  # 32 blocks
    for parts, most in ((3, 11), (5, 7), (7, 5), (32, 1), (64, 1)):
        assert max(len(share) for share in share_blocks(blocks, parts)) == most
