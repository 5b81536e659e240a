"""What a reward is called: terms with weights, each a metric, an extractor and a form."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Final, NoReturn

from merge_rl.errors import ConfigError

_NUMBER: Final = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_NAME: Final = r"[A-Za-z](?:[\w.:-]*\w)?"
_TERM: Final = re.compile(rf"\s*(?:({_NUMBER})\s*\*\s*)?({_NAME})\s*")


@dataclass(frozen=True)
class RewardTerm:
    """One term of a reward."""

    name: str  # as written
    base: str  # what a registry calls it, without the extractor: "fid-subset"
    extractor: str | None  # None: the checkpoint set's
    weight: float = 1.0


@functools.cache
def parse_reward(text: str) -> tuple[RewardTerm, ...]:
    """The terms of a reward, in order.

    Raises ConfigError for what is no sum of terms, for weights that are not above 0, and for a term
    that comes twice. Which names are known, registries say.
    """
    terms, position = [], 0
    while True:
        found = _TERM.match(text, position)
        if found is None:
            _refuse(text, position)
        weight = float(found[1]) if found[1] else 1.0
        if not 0 < weight < math.inf:
            raise ConfigError(f"reward {text!r}: expected weights above 0, got {found[1]}")
        terms.append(_named(found[2], weight))
        position = found.end()
        if position == len(text):
            break
        if text[position] != "+":
            _refuse(text, position)
        position += 1
    seen = [(term.base, term.extractor) for term in terms]
    twice = [term.name for term, key in zip(terms, seen, strict=True) if seen.count(key) > 1]
    if twice:
        raise ConfigError(f"reward {text!r}: {twice[0]!r} comes twice; give it one weight")
    return tuple(terms)


def _named(name: str, weight: float) -> RewardTerm:
    metric, _, rest = name.partition("-")
    extractor, _, form = rest.rpartition("-")
    base = f"{'fid' if metric == 'fd' else metric}-{form}"
    return RewardTerm(name, base, extractor or None, weight)


def _refuse(text: str, position: int) -> NoReturn:
    found = repr(text[position:].strip()) if text[position:].strip() else "nothing"
    raise ConfigError(
        f"reward {text!r}: expected NAME or NUMBER * NAME, joined by +, found {found} "
        f"after {text[:position].strip()!r}"
    )
