"""Groups of tensors that follow the network: its stages, or each of its blocks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from merge_rl.errors import UnknownNameError

BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")  # of a transformer
LEVEL = re.compile(r"(?:^|\.)(enc|dec)\.(\d+x\d+)_")  # of a U-Net
DEPTHS = 3  # stages that the blocks of a transformer are divided into


def one_group(_names: Sequence[str]) -> dict[str, str]:
    """The same coefficients for all tensors."""
    return {}


def stages(names: Sequence[str]) -> dict[str, str]:
    """Stages of a network, as patterns for `merge_rl.core.groups.assign_groups`.

    A transformer's blocks in thirds by depth, and its final layer; a U-Net's encoder and decoder
    at each resolution. What is left, mostly embeddings, is the group "rest". A network that has
    neither has one group.
    """
    depth = 1 + max((int(match[1]) for match in map(BLOCK.search, names) if match), default=-1)
    if depth:
        found = {}
        parts = min(DEPTHS, depth)
        for part in range(parts):
            first, last = part * depth // parts, (part + 1) * depth // parts - 1
            label = f"blocks {first}-{last}" if last > first else f"block {first}"
            numbers = "|".join(map(str, range(first, last + 1)))
            found[label] = rf"(?:^|\.)blocks\.(?:{numbers})\."
        final = r"(?:^|\.)final_layer\."
        return {**found, "final layer": final} if any(re.search(final, n) for n in names) else found
    sizes = {
        side: sorted({m[2] for m in map(LEVEL.search, names) if m and m[1] == side}, key=_width)
        for side in ("enc", "dec")
    }
    # In the order of the network: down to the smallest resolution, and up again.
    order = [("enc", size) for size in reversed(sizes["enc"])]
    order += [("dec", size) for size in sizes["dec"]]
    return {f"{side} {size}": rf"(?:^|\.){side}\.{size}_" for side, size in order}


def blocks(names: Sequence[str]) -> dict[str, str]:
    """Every block of a transformer or a U-Net a group of its own; the others are "rest"."""
    for pattern in (r"(?:^|\.)(?P<each>blocks\.\d+)\.", r"(?:^|\.)(?P<each>(?:enc|dec)\.\w+)\."):
        if any(re.search(pattern, name) for name in names):
            return {"block": pattern}
    return {}


GROUPINGS: Final[Mapping[str, Callable[[Sequence[str]], dict[str, str]]]] = {
    "stages": stages, "blocks": blocks, "one": one_group,
}  # fmt: skip


def grouping(name: str, names: Sequence[str]) -> dict[str, str]:
    """Patterns of a grouping, by its name, for these tensors; UnknownNameError for others."""
    if name not in GROUPINGS:
        raise UnknownNameError("grouping", name, tuple(GROUPINGS))
    return GROUPINGS[name](names)


def _width(size: str) -> int:
    return int(size.split("x")[0])
