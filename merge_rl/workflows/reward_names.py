"""What `--reward` may say: names, and weighted sums of names.

    reward     = term, or terms joined by +
    term       = name, or number * name
    name       = METRIC-FORM, or METRIC-EXTRACTOR-FORM

as in `fid-subset + 0.2 * fd-dinov2-subset`. METRIC-FORM is a registered reward; `fd` is another
word for `fid`, which means Inception to many. Without an extractor, the checkpoint set's is meant.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final, NoReturn

from merge_rl.errors import ConfigError, UnknownNameError
from merge_rl.registry import REWARDS
from merge_rl.workflows.extractors import require_known

_NUMBER: Final = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_NAME: Final = r"[A-Za-z](?:[\w.:-]*\w)?"
_TERM: Final = re.compile(rf"\s*(?:({_NUMBER})\s*\*\s*)?({_NAME})\s*")


@dataclass(frozen=True)
class RewardTerm:
    """One term of a reward."""

    name: str  # as written
    base: str  # the registered reward
    extractor: str | None  # None: the checkpoint set's
    weight: float = 1.0


def parse_reward(text: str) -> tuple[RewardTerm, ...]:
    """The terms of a reward, in order.

    Raises UnknownNameError for a reward or extractor that is not registered, ConfigError for what
    is no sum of terms, for weights that are not above 0, and for a term that comes twice.
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
    if base not in REWARDS:
        raise UnknownNameError("reward", name, REWARDS)
    if extractor:
        require_known(extractor)
    return RewardTerm(name, base, extractor or None, weight)


def _refuse(text: str, position: int) -> NoReturn:
    found = repr(text[position:].strip()) if text[position:].strip() else "nothing"
    raise ConfigError(
        f"reward {text!r}: expected NAME or NUMBER * NAME, joined by +, found {found} "
        f"after {text[:position].strip()!r}"
    )
