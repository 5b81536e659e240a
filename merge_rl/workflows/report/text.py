"""Numbers, intervals and Markdown tables, as every page writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from merge_rl.core.distances.intervals import Interval

Row = list[str]
NAMES: Final = {"heldout": "held-out", "reference": "reference"}


def number(value: float | None, form: str = ".3f") -> str:
    """Three decimals, or as a format says; words for None and NaN."""
    return "not finite" if value is None or math.isnan(value) else format(value, form)


def duration(seconds: float) -> str:
    """90 -> "90 s", 7500 -> "2 h 5 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def interval(
    value: Mapping[str, Any] | Interval, form: str = ".3f", *, middle: str = "mean"
) -> str:
    """Mean [low, high], or another `middle`; "+.3f" shows the sign of a difference."""
    found = value if isinstance(value, Mapping) else vars(value)
    mean, low, high = (number(found[key], form) for key in (middle, "low", "high"))
    return mean if mean == number(None) else f"{mean} [{low}, {high}]"


def floor_lines(document: Mapping[str, Any]) -> list[str]:
    """How near real images come to real images; none where that is not known."""
    floor = document.get("floor")
    return [] if floor is None else [f"floor: both halves of the real images are {floor:.3f} apart"]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; a bar in a cell is escaped."""
    lines = [list(columns), ["---"] * len(columns), *map(list, rows)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )
