"""Options that stand for several settings at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from merge_rl.config import MODEL


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


SHORTHANDS: Final = (
    Shorthand(
        flag="--fast", kind=bool, help="On an accelerator: a compiled network in bfloat16.",
        panel=MODEL, key="sampler.compile", meaning=fast,
    ),
)  # fmt: skip
