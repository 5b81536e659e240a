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
    """Put each tensor name into the group of the first pattern that is found in it (re.search).

    `patterns` maps group names to regular expressions, in order. Names that match none form a last
    group "rest"; there is no such group if every name matches. A group that would be left without
    a tensor is refused, as its row of coefficients would do nothing.
    """
    if "rest" in patterns:
        raise ConfigError('expected group names other than "rest", the name of unmatched tensors')
    compiled = [_compile(group, pattern) for group, pattern in patterns.items()]
    rest = len(compiled)
    index = tuple(
        next((i for i, pattern in enumerate(compiled) if pattern.search(name)), rest)
        for name in names
    )
    for i, (group, pattern) in enumerate(patterns.items()):
        if i not in index:
            raise ConfigError(
                f"expected pattern {pattern!r} of group {group!r} to take at least one tensor, got"
                f" 0 of {len(names)}: it matches none, or earlier groups have them"
            )
    return Groups((*patterns, "rest") if rest in index else tuple(patterns), index)


def _compile(group: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"expected a regular expression for group {group!r}, got {pattern!r}: {error}"
        ) from None
