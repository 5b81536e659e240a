"""Options that stand for several settings at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from merge_rl.config import LEARN, MODEL
from merge_rl.errors import ConfigError

WINDOW: Final = re.compile(r"(?:(\d+)\+)?(\d+)")


@dataclass(frozen=True, kw_only=True)
class Shorthand:
    """An option of the commands that offer the setting `key`."""

    flag: str
    kind: type
    help: str
    panel: str
    key: str
    meaning: Callable[[Any], Mapping[str, Any]]  # from its value to dotted keys and values
    metavar: str | None = None


def fast(on: bool) -> Mapping[str, Any]:
    """What --fast sets."""
    return {"sampler.precision": "bfloat16", "sampler.compile": True} if on else {}


def window(text: str) -> Mapping[str, Any]:
    """What --window [S+]N sets."""
    found = WINDOW.fullmatch(text)
    if found is None:
        raise ConfigError(f"expected --window N or S+N, got {text!r}")
    start = {} if found[1] is None else {"rollout.window_start": int(found[1])}
    return {"rollout.window_size": int(found[2]), **start}


SHORTHANDS: Final = (
    Shorthand(
        flag="--fast", kind=bool, help="On an accelerator: a compiled network in bfloat16.",
        panel=MODEL, key="sampler.compile", meaning=fast,
    ),
    Shorthand(
        flag="--window", kind=str, metavar="[S+]N", panel=LEARN, key="rollout.window_size",
        help="Noise in N solver steps alone, an ODE elsewhere: N moves, S+N starts at S.",
        meaning=window,
    ),
)  # fmt: skip
