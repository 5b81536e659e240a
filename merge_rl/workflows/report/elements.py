"""Parts that several pages are made of: interval strips, heat tables, pictures, figures."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from merge_rl.errors import RunError
from merge_rl.progress import number
from merge_rl.storage.files import Pixels, decode_image, picture_address, reading_from
from merge_rl.untrusted import load_json_mapping
from merge_rl.workflows.report.markup import NOTHING, Safe, interval, joined, safe, tag
from merge_rl.workflows.report.results import Verdict

# Columns of a heat table, up to which their names stand upright, and it fits a printed page.
FEW_COLUMNS, PAGE_COLUMNS = 8, 26


def headline(verdict: Verdict | None, otherwise: str, context: str) -> Safe:
    """The first thing that is read: the verdict, or what there is instead of one."""
    about = tag("p", context, class_="context")
    if verdict is None:
        return tag("header", about, tag("h1", otherwise, class_="open"))
    claim = tag("h1", verdict.claim, class_=verdict.tone)
    return tag("header", about, claim, tag("p", verdict.numbers, class_="numbers"))


def facts(pairs: Mapping[str, str]) -> Safe:
    """Names and values beside each other; those without a value are left out."""
    kept = [(name, value) for name, value in pairs.items() if value]
    cells = (tag("div", tag("dt", name), tag("dd", value)) for name, value in kept)
    return tag("dl", *cells, class_="facts") if kept else NOTHING


@dataclass(frozen=True)
class Span:
    """The part of a scale that strips show."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float | None], *, zero: bool = False) -> Span:
        """What holds all finite values, with `zero` that too, and a little room."""
        known = [v for v in values if v is not None and math.isfinite(v)]
        known += [0.0] if zero or not known else []
        room = 0.06 * (max(known) - min(known)) or 0.06 * abs(known[0]) or 1.0
        return cls(min(known) - room, max(known) + room)

    def percent(self, value: float) -> float:
        """The place of a value."""
        return 100 * (value - self.low) / (self.high - self.low)


def strip(
    value: Mapping[str, Any], span: Span, *, middle: str = "mean", zero: bool = False
) -> Safe:
    """An interval with its middle on a scale that rows share; its values as dots beneath.

    Nothing for what has no score.
    """
    mean, low, high = (value[key] for key in (middle, "low", "high"))
    if mean is None:
        return NOTHING
    bar = NOTHING
    if low is not None and high is not None:
        left, right = span.percent(low), span.percent(high)
        bar = tag("i", style=f"left:{left:.2f}%;width:{max(right - left, 0):.2f}%")
    at = [v for v in value.get("values", ()) if v is not None]
    dots = (tag("u", style=f"left:{span.percent(v):.2f}%") for v in at)
    axis = tag("s", style=f"left:{span.percent(0):.2f}%") if zero else NOTHING
    mark = tag("b", style=f"left:{span.percent(mean):.2f}%")
    shown = interval(value, middle=middle)
    return tag("span", axis, bar, *dots, mark, class_="strip", role="img", aria_label=shown)


def span_of(values: Sequence[Mapping[str, Any]], *, zero: bool = False) -> Span:
    """The scale of the strips of these intervals."""
    ends = [v[key] for v in values for key in ("low", "high", "mean", "median") if key in v]
    return Span.of([*ends, *(dot for v in values for dot in v.get("values", ()))], zero=zero)


def heat_table(
    corner: str,
    columns: Sequence[str],
    rows: Mapping[str, Sequence[float]],
    *,
    apart: Container[str] = (),
) -> Safe:
    """Numbers with shades by sign and size, as text: legible at any number of rows and columns.

    Rows and columns of the names in `apart` are others than the rest, and bear no shade.
    """
    own = [
        value
        for name, row in rows.items()
        for column, value in zip(columns, row, strict=True)
        if name not in apart and column not in apart and math.isfinite(value)
    ]
    largest = max(map(abs, own), default=0.0) or 1.0
    dense = len(columns) > FEW_COLUMNS
    head = tag("tr", tag("th", corner), *(tag("th", tag("span", c), scope="col") for c in columns))
    body = [
        tag(
            "tr", tag("th", name, scope="row"),
            *(
                _shade(value, largest, apart=name in apart or column in apart, short=dense)
                for column, value in zip(columns, row, strict=True)
            ),
        )
        for name, row in rows.items()
    ]  # fmt: skip
    kinds = {FEW_COLUMNS: " dense", PAGE_COLUMNS: " broad"}
    kind = "heat" + "".join(more for few, more in kinds.items() if len(columns) > few)
    drawn = tag("table", tag("thead", head), tag("tbody", *body), class_=kind)
    return tag("div", drawn, class_="scroll")


def _shade(value: float, largest: float, *, apart: bool, short: bool) -> Safe:
    shown = f"{value:+.2f}"
    if short:  # ".05" and "0", so that two dozen columns need no scrolling
        shown = "0" if shown[1:] == "0.00" else shown.removeprefix("+")
        shown = re.sub(r"^(-?)0\.", r"\1.", shown)
    shown = shown.replace("-", "\N{MINUS SIGN}")
    if apart:
        return tag("td", shown, class_="apart")
    kind = "up" if value > 0 else "down"
    return tag("td", shown, class_=kind, style=f"--w:{min(abs(value) / largest, 1):.2f}")


def shares(parts: Mapping[str, float]) -> Safe:
    """A bar in pieces, in order, with a legend."""
    total = sum(parts.values())
    if total <= 0:
        return NOTHING
    pieces = [
        tag("i", class_=f"c{i + 1}", style=f"width:{100 * value / total:.2f}%")
        for i, value in enumerate(parts.values())
    ]
    legend = [
        tag("span", tag("i", class_=f"c{i + 1}"), f"{name} {value:,.0f} ({value / total:.0%})")
        for i, (name, value) in enumerate(parts.items())
    ]
    bar = tag("div", *pieces, class_="shares")
    return joined([bar, tag("p", *legend, class_="legend")])


def figure(content: str, caption: str) -> Safe:
    """A picture or a chart with what it shows."""
    return tag("figure", content, tag("figcaption", caption)) if content else NOTHING


def image(address: str, alt: str, *, sharp: bool) -> Safe:
    """A picture within the page; pixels of `sharp` ones stay squares."""
    return tag("img", void=True, src=address, alt=alt, class_="sharp" if sharp else None)


def badge(outcome: str) -> Safe:
    """An outcome in its colour."""
    return tag("span", outcome, class_=f"badge {outcome.partition(' ')[0]}")


def value_or_dash(value: float | None, form: str = ".3f") -> str:
    """A number; a dash for what is not known."""
    return "\N{EN DASH}" if value is None else number(value, form)


def lines(*parts: str) -> Safe:
    """One under the other."""
    return joined(map(safe, parts), str(tag("br", void=True)))


SAMPLES: Final = "samples/samples.json"
TITLES: Final = {"start": "Before: the start", "result": "After: the result"}
LARGE: Final = 256  # pixels a side, to which larger pictures are scaled down
GRID: Final = 1200


def pictured(folder: Path) -> Mapping[str, Any] | None:
    """Size, seeds and labels of the images of either end, where a search kept some."""
    if not (folder / SAMPLES).is_file():
        return None
    with reading_from(folder / SAMPLES, RunError) as file:
        return load_json_mapping(file.read(), str(folder / SAMPLES), RunError)


def before_after(folder: Path, captions: Mapping[str, str]) -> Safe:
    """Tiles of start and result on equal seeds, of what `optimize` kept; nothing without it.

    `captions` are the scores beneath the titles.
    """
    record = pictured(folder)
    if record is None:
        return NOTHING
    panels = []
    for entry, title in TITLES.items():
        path = folder / "samples" / f"{entry}.png"
        if path.is_file():
            panels.append(_panel(title, captions.get(entry, ""), _tiles(_read(path), record)))
    return tag("div", *panels, class_="pair") if panels else NOTHING


def grids(pictures: Mapping[str, tuple[Path, str]]) -> Safe:
    """Whole grids by title, each with a caption; nothing for files that are not there."""
    panels = [
        _panel(title, caption, image(picture_address(_read(path), GRID), title, sharp=True))
        for title, (path, caption) in pictures.items()
        if path.is_file()
    ]
    return tag("div", *panels, class_="pair") if panels else NOTHING


def _read(path: Path) -> Pixels:
    with reading_from(path, RunError) as file:
        return decode_image(file.read(), str(path))


def _panel(title: str, caption: str, content: str) -> Safe:
    said = tag("figcaption", tag("b", title), f", {caption}" if caption else "")
    return tag("figure", said, content)


def _tiles(grid: Pixels, record: Mapping[str, Any]) -> Safe:
    """Every image of a grid without gaps, with its class."""
    height, width, columns = (int(record[key]) for key in ("height", "width", "columns"))
    cells = []
    for index, label in enumerate(record["labels"]):
        top, left = index // columns * height, index % columns * width
        pixels = grid[top : top + height, left : left + width]
        seed = record["first_seed"] + index
        said = f"seed {seed}" if label is None else f"class {label}, seed {seed}"
        picture = image(picture_address(pixels, LARGE), said, sharp=max(height, width) < LARGE)
        cells.append(tag("div", picture, "" if label is None else str(label)))
    return tag("div", joined(cells), class_="tiles", style=f"--n:{min(columns, 10)}")
