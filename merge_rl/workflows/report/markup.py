"""HTML from small functions: whatever is no markup already is escaped where it enters a page."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final

from merge_rl.progress import number

if TYPE_CHECKING:
    from merge_rl.core.distances.intervals import Interval

Row = list[str]
NAMES: Final = {"heldout": "held-out", "reference": "reference"}


ABBREVIATED: Final = frozenset({"fd", "fid", "kid", "mmd", "prdc"})


def metric_text(name: str) -> str:
    """A metric's name as people write it: "quadratic-mmd" as quadratic MMD."""
    return " ".join(word.upper() if word in ABBREVIATED else word for word in name.split("-"))


def largest(values: Iterable[float | None]) -> float | None:
    """Of numbers, without signs; None where none is finite."""
    return max((abs(v) for v in values if v is not None and math.isfinite(v)), default=None)


def interval(
    value: Mapping[str, Any] | Interval, form: str = ".3f", *, middle: str = "mean"
) -> str:
    """Mean [low, high], or another `middle`; "+.3f" shows the sign of a difference."""
    found = value if isinstance(value, Mapping) else vars(value)
    ends = [found[key] for key in (middle, "low", "high")]
    mean, low, high = (number(value, form, largest(ends)) for value in ends)
    return mean if mean == number(None) else f"{mean} [{low}, {high}]"


def floor_lines(document: Mapping[str, Any]) -> list[str]:
    """How near real images come to real images; none where that is not known."""
    floor = document.get("floor")
    said = f"floor: both halves of the real images are {number(floor)} apart"
    return [] if floor is None else [said]


MOST_COLUMNS: Final = 12


def few_columns(
    groups: Sequence[str], rows: Sequence[Sequence[float]]
) -> tuple[list[str], list[Sequence[float]]]:
    """Groups of tensors and their coefficients (G, K); mean, lowest and highest of many groups."""
    if len(groups) <= MOST_COLUMNS:
        return list(groups), list(rows)
    each = list(zip(*rows, strict=True))
    heads = [f"mean of {len(groups)} groups", "lowest", "highest"]
    return heads, [[of(values) for values in each] for of in (fmean, min, max)]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; a bar in a cell is escaped."""
    lines = [list(columns), ["---"] * len(columns), *map(list, rows)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


STYLE: Final = Path(__file__).parents[2] / "data/report/page.css"
# No script, no font, no frame, nothing from elsewhere: a page shows what is written in it.
POLICY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
RELOAD_SECONDS: Final = 10


class Safe(str):
    """Markup. All other text is escaped by the functions that take both."""

    __slots__ = ()


NOTHING: Final = Safe("")


def safe(content: str) -> Safe:
    """The markup itself, or text as markup that shows it."""
    return content if isinstance(content, Safe) else Safe(html.escape(content))


def joined(contents: Iterable[str], between: str = "") -> Safe:
    """One after the other."""
    return Safe(between.join(map(safe, contents)))


def tag(name: str, *children: str, void: bool = False, **attributes: str | int | None) -> Safe:
    """An element; `class_` is its class, `data_x` its data-x, and None leaves an attribute out."""
    named = {
        key.rstrip("_").replace("_", "-"): str(value)
        for key, value in attributes.items()
        if value is not None
    }
    said = "".join(f' {key}="{html.escape(value)}"' for key, value in named.items())
    end = "" if void else f"{joined(children)}</{name}>"
    return Safe(f"<{name}{said}>{end}")


def section(title: str, *children: str, note: str = "") -> Safe:
    """A part of the page; nothing where it has no content."""
    if not any(children):
        return NOTHING
    said = [tag("p", note, class_="note")] if note else []
    return tag("section", tag("h2", title), *said, *children)


def listed(lines: Sequence[str]) -> Safe:
    """A list of sentences; nothing where there are none."""
    return tag("ul", *(tag("li", line) for line in lines)) if lines else NOTHING


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str | None = None
) -> Safe:
    """A table whose first column names the rows; it scrolls by itself where it is too wide."""
    head = tag("tr", *(tag("th", column, scope="col") for column in columns))
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    ]
    drawn = tag("table", tag("thead", head), tag("tbody", *body), class_=kind)
    return tag("div", drawn, class_="scroll")


def code(text: str) -> Safe:
    """Lines to copy."""
    return tag("pre", tag("code", text))


def folded(summary: str, *children: str) -> Safe:
    """What opens on a click, and is open on paper."""
    return tag("details", tag("summary", summary), *children)


def document(title: str, *children: str, reloads: bool = False) -> str:
    """A whole page, which needs nothing but itself; one that `reloads` does so by itself."""
    refresh = str(RELOAD_SECONDS)
    head = [
        tag("meta", void=True, charset="utf-8"),
        Safe(f'<meta http-equiv="Content-Security-Policy" content="{html.escape(POLICY)}">'),
        Safe('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Safe('<meta name="color-scheme" content="light dark">'),
        Safe(f'<meta http-equiv="refresh" content="{refresh}">') if reloads else NOTHING,
        tag("title", title),
        tag("style", Safe(STYLE.read_text(encoding="utf-8"))),
    ]
    body = tag("body", tag("main", *children))
    whole = tag("html", tag("head", *head), body, lang="en")
    return f"<!doctype html>\n{whole}\n"
