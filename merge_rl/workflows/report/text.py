"""Numbers, intervals and Markdown tables, as every page writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final


def number(value: float | None) -> str:
    """Three decimals."""
    return "not finite" if value is None else f"{value:.3f}"


Row = list[str]
NAMES: Final = {"heldout": "held-out", "reference": "reference"}


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; a bar in a cell is escaped."""
    lines = [list(columns), ["---"] * len(columns), *map(list, rows)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def interval(value: Mapping[str, Any], form: str = ".3f") -> str:
    """Mean [low, high]."""
    if value["mean"] is None:
        return "not finite"
    mean, low, high = (format(value[key], form) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def signed_interval(value: Mapping[str, Any], form: str = "+.3f") -> str:
    """The same of a difference."""
    return interval(value, form)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
