"""The plot of a comparison: FID against images generated, and where every seed ended."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any, Final

from merge_rl.workflows.compare_text import NAMES
from merge_rl.workflows.pictures import counts_axis, drawing, legend_below, style, values_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHES: Final = {"newest": "--", "uniform average": ":", "best single": "-."}


def draw_comparison(document: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the plot of what `compare_searchers` gives; ConfigError without the library."""
    curves = document["curve_images"] > 0
    height = max(4.6, 1.6 + 0.42 * len(document["searchers"]))
    with drawing(path, 1, 2 if curves else 1, (13.0 if curves else 7.5, height)) as axes:
        if curves:
            _curves(axes[0], document)
        _ends(axes[-1], document)


def window(ends: Sequence[float]) -> tuple[float, float]:
    """The part of the scale to show: all results, and some room where the worse ones came from.

    Merges that are far worse than what was found would leave nothing to see of the differences.
    """
    low, high = min(ends), max(ends)
    span = max(high - low, 0.05 * abs(high))
    return low - 0.3 * span, high + 1.5 * span


def _window(document: Mapping[str, Any]) -> tuple[float, float]:
    name = document["headline"]
    values = [v for line in document["searchers"] for v in line["fid"][name]["values"]]
    ends = [value for value in values if value is not None]
    return window(ends) if ends else (0.0, 1.0)


def _fixed_label(entry: str, level: float, limits: tuple[float, float]) -> str:
    inside = limits[0] <= level <= limits[1]
    return entry if inside else f"{entry}: {level:.3f}, off the scale"


def _curves(axis: Axes, document: Mapping[str, Any]) -> None:
    name, values, limits = document["headline"], [], _window(document)
    for index, line in enumerate(document["searchers"]):
        points = [(p["images"], p[name]) for p in line["curve"] if p[name]["median"] is not None]
        if not points:
            continue
        images = [image for image, _ in points]
        middle = [value["median"] for _, value in points]
        low = [value["low"] for _, value in points]
        high = [value["high"] or value["median"] for _, value in points]
        look = style(index)
        axis.plot(images, middle, label=line["searcher"], markersize=5, **look)
        axis.fill_between(images, low, high, color=look["color"], alpha=0.15, linewidth=0)
        values += [*middle, *low, *high]
    for entry, fixed in document["fixed"].items():
        level = fixed["curve"][name]
        if level is not None:
            label = _fixed_label(entry, level, limits)
            axis.axhline(level, color="0.35", linestyle=DASHES[entry], linewidth=1.2, label=label)
    counts_axis(axis, [point["images"] for point in document["searchers"][0]["curve"]])
    values_axis(axis, values, f"{NAMES[name]} FID, N = {document['curve_images']:,}")
    axis.set_ylim(*limits)
    seeds = len(document["seeds"])
    axis.set_title(
        f"along the search: median and range of {seeds} seeds" if seeds > 1 else "along the search"
    )
    legend_below(axis)


def _ends(axis: Axes, document: Mapping[str, Any]) -> None:
    """A row for each searcher: every seed's result, and their median."""
    name = document["headline"]
    lines, limits = document["searchers"], _window(document)
    for index, line in enumerate(lines):
        look = style(index)
        ends = [value for value in line["fid"][name]["values"] if value is not None]
        axis.plot(ends, [index] * len(ends), linestyle="", alpha=0.6, markersize=6, **look)
        middle = line["fid"][name]["median"]
        if middle is not None:
            axis.plot([middle, middle], [index - 0.28, index + 0.28], color=look["color"], lw=2.5)
    for entry, fixed in document["fixed"].items():
        level = fixed["fid"][name]["mean"]
        if level is not None:
            label = _fixed_label(entry, level, limits)
            axis.axvline(level, color="0.35", linestyle=DASHES[entry], linewidth=1.2, label=label)
    axis.set_xlim(*limits)
    axis.set_yticks(range(len(lines)), [fill(line["searcher"], 24) for line in lines])
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.set_xlabel(f"{NAMES[name]} FID, N = {document['num_images']:,}")
    axis.set_title("results: each seed, and the median")
    axis.grid(alpha=0.25, axis="x")
    legend_below(axis)
