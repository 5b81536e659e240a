"""Groups of tensors: sets of tensors that share one row of coefficients."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merge_rl.errors import ConfigError


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
