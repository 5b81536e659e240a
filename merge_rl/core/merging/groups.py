"""Groups of tensors that share one row of coefficients: by pattern, by block, by stage."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from merge_rl.errors import ConfigError, UnknownNameError


@dataclass(frozen=True)
class Groups:
    """Groups of tensors: their names, and for each tensor the index of its group."""

    names: tuple[str, ...]
    index: tuple[int, ...]


def assign_groups(names: Sequence[str], patterns: Mapping[str, str]) -> Groups:
    r"""Put each tensor name into the group of the first pattern that is found in it (re.search).

    `patterns` maps group names to regular expressions, in order. A pattern with a part called each,
    as in `(?P<each>blocks\.\d+)`, makes a group of every text that this part takes, "NAME TEXT",
    in the order of the tensors. Names that match none form a last group "rest"; there is no such
    group if every name matches. A group that would be left without a tensor is refused, as its row
    of coefficients would do nothing, and so are two groups of one name.
    """
    if "rest" in patterns:
        raise ConfigError('expected group names other than "rest", the name of unmatched tensors')
    compiled = {group: _compile(group, pattern) for group, pattern in patterns.items()}
    found = [_group_of(name, compiled) for name in names]
    taken = dict.fromkeys(key for key in found if key is not None)
    for group, pattern in patterns.items():
        if not any(first == group for first, _ in taken):
            raise ConfigError(
                f"expected pattern {pattern!r} of group {group!r} to take at least one tensor, got"
                f" 0 of {len(names)}: it matches none, or earlier groups have them"
            )
    order = sorted(taken, key=lambda key: list(patterns).index(key[0]))  # stable
    index = tuple(order.index(key) if key is not None else len(order) for key in found)
    labels = tuple(" ".join(part for part in key if part) for key in order)
    if len(set(labels)) < len(labels):
        raise ConfigError(f"expected groups of different names, got {', '.join(labels)}")
    return Groups((*labels, "rest") if None in found else labels, index)


def _group_of(name: str, compiled: Mapping[str, re.Pattern[str]]) -> tuple[str, str] | None:
    """The group that a tensor belongs to, and what its pattern's part `each` took ("" if none)."""
    for group, pattern in compiled.items():
        match = pattern.search(name)
        if match is not None:
            return group, match.groupdict().get("each") or ""
    return None


def _compile(group: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"expected a regular expression for group {group!r}, got {pattern!r}: {error}"
        ) from None


BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")  # of a transformer
ENDS: Final = {
    # The uncertainty head of the training loss makes no image: coefficients of its own would be
    # searched for nothing, so it goes with the embedding of the noise level, its only input.
    "embeddings": r"^(?:unet\.emb|logvar)_",
    "output": r"^unet\.out_",
}  # of a U-Net, beside its levels
LEVEL = re.compile(r"(?:^|\.)(enc|dec)\.(\d+x\d+)_")  # of a U-Net
DEPTHS = 3  # stages that the blocks of a transformer are divided into


def one_group(_names: Sequence[str]) -> dict[str, str]:
    """The same coefficients for all tensors."""
    return {}


def stages(names: Sequence[str]) -> dict[str, str]:
    """Stages of a network, as patterns for `merge_rl.core.merging.groups.assign_groups`.

    A transformer's blocks in thirds by depth, and its final layer; a U-Net's encoder and decoder
    at each resolution, its embeddings and its output; of any other network its lists of modules, in
    thirds or one by one. What is left, a transformer's embeddings, is the group "rest". A network
    that has none has one group.
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
    if not any(sizes.values()):
        return _stages_of_lists(names)
    # In the order of the network: down to the smallest resolution, and up again.
    order = [("enc", size) for size in reversed(sizes["enc"])]
    order += [("dec", size) for size in sizes["dec"]]
    found = {f"{side} {size}": rf"(?:^|\.){side}\.{size}_" for side, size in order}
    return found | _ends(names)


def blocks(names: Sequence[str]) -> dict[str, str]:
    """Every block, or element of a list of modules, a group of its own; the others are "rest"."""
    for pattern in (r"(?:^|\.)(?P<each>blocks\.\d+)\.", r"(?:^|\.)(?P<each>(?:enc|dec)\.\w+)\."):
        if any(re.search(pattern, name) for name in names):
            return {"block": pattern} | _ends(names)
    return _blocks_of_lists(names)


def tensors(_names: Sequence[str]) -> dict[str, str]:
    """Every tensor a group of its own."""
    return {"tensor": "^(?P<each>.+)$"}


LAST: Final = "final layers"
MOST_PARTS: Final = 12  # of a network of several lists that is not divided into thirds


def module_lists(names: Sequence[str]) -> dict[str, list[int]]:
    """Lists of modules, the outermost of each tensor, with the numbers of their elements.

    "layers.3.attn.weight" lies in element 3 of "layers"; a list has two elements at least.
    """
    found: dict[str, set[int]] = {}
    for name in names:
        for prefix, number in _places(name):
            found.setdefault(prefix, set()).add(number)
    outermost = (next((p for p, _ in _places(n) if len(found[p]) > 1), None) for n in names)
    taken = dict.fromkeys(prefix for prefix in outermost if prefix is not None)
    return {prefix: sorted(found[prefix]) for prefix in taken}


def _places(name: str) -> list[tuple[str, int]]:
    parts = name.split(".")
    return [(".".join(parts[:i]), int(p)) for i, p in enumerate(parts[:-1]) if p.isdecimal()]


def _stages_of_lists(names: Sequence[str]) -> dict[str, str]:
    """Stages of any network: its lists of modules in thirds, or their elements where these are few.

    What comes after the last list, in the order of the tensors, is the group "final layers": by the
    names alone these may be buffers, see `with_weights`.
    """
    lists = module_lists(names)
    if not lists:
        return {}
    few = len(lists) > 1 and sum(map(len, lists.values())) <= MOST_PARTS
    found = {}
    for prefix, numbers in lists.items():
        parts = len(numbers) if few else min(DEPTHS, len(numbers))
        for i in range(parts):
            part = numbers[i * len(numbers) // parts : (i + 1) * len(numbers) // parts]
            label = f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}"
            found[f"{prefix or 'layer'} {label}"] = _elements(prefix, "|".join(map(str, part)))
    last = max(i for i, name in enumerate(names) if any(re.search(p, name) for p in found.values()))
    if last + 1 < len(names):
        found[LAST] = rf"^(?:{'|'.join(map(re.escape, names[last + 1 :]))})$"
    return found


def with_weights(patterns: Mapping[str, str], merged: Sequence[str]) -> dict[str, str]:
    """Patterns without that of final layers where these are no weights: a schedule's constants."""
    return {
        group: pattern
        for group, pattern in patterns.items()
        if group != LAST or any(re.search(pattern, name) for name in merged)
    }


def _elements(prefix: str, numbers: str) -> str:
    return rf"^{re.escape(prefix)}\.(?:{numbers})\." if prefix else rf"^(?:{numbers})\."


def _blocks_of_lists(names: Sequence[str]) -> dict[str, str]:
    """Every element of every list of modules."""
    lists = [re.escape(f"{prefix}.") if prefix else "" for prefix in module_lists(names)]
    return {"block": rf"^(?P<each>(?:{'|'.join(lists)})\d+)\."} if lists else {}


def _ends(names: Sequence[str]) -> dict[str, str]:
    """What a U-Net has beside its levels, where it is named as EDM2 names it."""
    return {k: v for k, v in ENDS.items() if any(re.search(v, name) for name in names)}


GROUPINGS: Final[Mapping[str, Callable[[Sequence[str]], dict[str, str]]]] = {
    "stages": stages, "blocks": blocks, "tensors": tensors, "one": one_group,
}  # fmt: skip


def grouping(name: str, names: Sequence[str]) -> dict[str, str]:
    """Patterns of a grouping, by its name, for these tensors; UnknownNameError for others."""
    if name not in GROUPINGS:
        raise UnknownNameError("grouping", name, tuple(GROUPINGS))
    return GROUPINGS[name](names)


def _width(size: str) -> int:
    return int(size.split("x")[0])
