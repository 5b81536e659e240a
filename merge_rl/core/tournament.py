"""Successive halving: how often to look at each of several entries before one is left.

Jamieson & Talwalkar, 2016, arXiv:1502.07943: all entries are scored, the worse half drops out, and
those that are left are scored with twice the images, until one remains.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Rung(NamedTuple):
    """A stage: how many entries are scored, and with how many images each."""

    entries: int
    images: int


def halving_plan(entries: int, images: int, least: int = 1) -> tuple[Rung, ...]:
    """The rungs of a tournament of so many entries that costs at most `images`.

    Every rung costs about the same: E entries and r rungs give images / (r E) to each entry of the
    first, and as much more to those of a later one as they are fewer. () where one entry is left
    without a look, and where an entry of the first rung would have fewer than `least` images.
    """
    counts, left = [], entries
    while left > 1:
        counts.append(left)
        left = math.ceil(left / 2)
    if not counts:
        return ()
    share = images // len(counts)
    rungs = tuple(Rung(count, share // count) for count in counts)
    return rungs if rungs[0].images >= max(least, 1) else ()


def most_entries(images: int, least: int) -> int:
    """How many entries a tournament of so many images can hold, with `least` for each at first.

    The largest E with E * ceil(log2 E) * least <= images; 1 where not even two can be compared.
    """
    entries = 1
    while halving_plan(entries + 1, images, least):
        entries += 1
    return entries


def cost(rungs: tuple[Rung, ...]) -> int:
    """Images of all rungs."""
    return sum(rung.entries * rung.images for rung in rungs)
