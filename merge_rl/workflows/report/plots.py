"""The plots of a run and of a comparison."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any, Final

from merge_rl.progress import number
from merge_rl.workflows.report.figures import counts_axis, drawing, legend_below, style, values_axis
from merge_rl.workflows.report.markup import NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes


Events = Sequence[Mapping[str, Any]]
FEW_CELLS = 120  # coefficients, up to which each is written down
MANY = 10  # checkpoints that a legend can hold


def draw_run(
    events: Events, result: Mapping[str, Any] | None, path: str | os.PathLike[str]
) -> None:
    """Write the plot; ConfigError, naming the extra, without the library."""
    comparison = (result or {}).get("comparison")
    with drawing(path, 2, 2, (12.0, 8.4)) as axes:
        progress(axes[0], events, {})
        gap(axes[1], events)
        _coefficients(axes[2], events, result)
        if comparison is None:
            axes[3].set_axis_off()
        else:
            _final(axes[3], comparison)


def progress(axis: Axes, events: Events, levels: Mapping[str, float]) -> None:
    """Distance along the search, held-out too where it is known, and `levels` to compare with."""
    pooled = [event for event in events if event["pool_after"] is not None]
    if not pooled:
        _candidates(axis, events)
        return
    name = pooled[-1].get("distance", "FID")
    images, values = [event["images"] for event in pooled], [e["pool_after"] for e in pooled]
    axis.plot(images, values, "-o", color="C0", markersize=3, label="reference")
    held_out = [(e["images"], e["heldout"]) for e in pooled if e.get("heldout") is not None]
    if held_out:
        axis.plot(*zip(*held_out, strict=True), "--s", color="C1", markersize=3, label="held-out")
    for index, (entry, level) in enumerate(levels.items()):
        axis.axhline(
            level, linewidth=1.2, label=f"{entry}: {number(level)}",
            color=f"C{2 + index % 5}", linestyle=STYLES[index % len(STYLES)],
        )  # fmt: skip
    axis.set_title("the pool, which holds images of the policy mean")
    values_axis(axis, [*values, *(v for _, v in held_out), *levels.values()], f"{name} of the pool")
    if held_out or levels:
        legend_below(axis)
    counts_axis(axis)


STYLES: Final = (":", "-.", (0, (5, 1)), (0, (1, 1)))


def _candidates(axis: Axes, events: Events) -> None:
    """Of rewards without a pool: mean and best of each round."""
    images = [event["images"] for event in events]
    sound = [[-r for r in event["rewards"] if r is not None] for event in events]
    kept = [(at, values) for at, values in zip(images, sound, strict=True) if values]
    means = [sum(values) / len(values) for _, values in kept]
    axis.plot([at for at, _ in kept], means, color="C0", label="mean of the candidates")
    axis.plot([at for at, _ in kept], [min(v) for _, v in kept], ".", color="C1", label="best")
    axis.set_title("candidates of a round")
    values_axis(axis, means, "distance to the reference (- reward)")
    if kept:
        axis.legend(fontsize=8)
    counts_axis(axis)


def gap(axis: Axes, events: Events) -> None:
    """How far fresh images would move the pool's distance, along the search."""
    known = [event for event in events if event.get("gap") is not None]
    axis.set_title("gap: how far fresh images would move the pool's distance")
    if not known:
        axis.text(0.5, 0.5, "this reward has no pool", ha="center", transform=axis.transAxes)
        axis.set_axis_off()
        return
    images = [event["images"] for event in known]
    axis.axhline(0, color="0.6", linewidth=1)
    gaps = [100 * event["gap"] for event in known]
    means = [(e["images"], 100 * e["gap_mean"]) for e in known if "gap_mean" in e]
    axis.plot(images, gaps, "." if means else "-o", markersize=3, label="one refresh")
    if means:
        axis.plot(*zip(*means, strict=True), label="running mean")
    damped = [(e["images"], 100 * e["gap"]) for e in known if e.get("damped")]
    if damped:
        axis.plot(*zip(*damped, strict=True), "x", color="C3", label="step made smaller")
    axis.set_ylabel("% of the pool's distance")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    counts_axis(axis)


def _coefficients(axis: Axes, events: Events, result: Mapping[str, Any] | None) -> None:
    """A line a checkpoint, with dots for what was reported; of several groups the result alone."""
    import matplotlib

    if result and len(result["groups"]) > 1:
        _group_coefficients(axis, result)
        return
    if not events:
        axis.set_axis_off()
        return
    count = len(events[0]["coefficients"][0])
    names = list(result["checkpoints"]) if result else [f"checkpoint {i + 1}" for i in range(count)]
    colours = matplotlib.colormaps["viridis"]
    rows = [(event["images"], event["coefficients"][0]) for event in events]
    if result:
        start = result["start"]
        rows.insert(0, (start["images"], start["coefficients"][0]))
    images = [at for at, _ in rows]
    for index, name in enumerate(names):
        colour = colours(0.95 * index / max(count - 1, 1))
        values = [row[index] for _, row in rows]
        axis.plot(images, values, color=colour, linewidth=1.3, label=name)
        if result:
            axis.plot(images[-1], result["coefficients"][0][index], "o", color=colour, markersize=5)
    axis.axhline(0, color="0.6", linewidth=1)
    axis.set_title("coefficients of the mean; dots: the result" if result else "coefficients")
    axis.grid(alpha=0.25)
    if count <= MANY:
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False)
    counts_axis(axis)


def _group_coefficients(axis: Axes, result: Mapping[str, Any]) -> None:
    """A row a group of tensors, a column a checkpoint; white is 0."""
    rows, names = result["coefficients"], result["checkpoints"]
    largest = max(abs(value) for row in rows for value in row) or 1.0
    shades = axis.imshow(rows, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
    axis.set_yticks(range(len(rows)), result["groups"], fontsize=8)
    if len(names) <= MANY:
        axis.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=7)
    else:
        axis.set_xlabel(f"{len(names)} checkpoints, in their order")
        axis.set_xticks([])
    if len(rows) * len(names) <= FEW_CELLS:
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                shade = "white" if abs(value) > 0.6 * largest else "black"
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", size=7, color=shade)
    axis.figure.colorbar(shades, ax=axis)
    axis.set_title("coefficients of the result")


def _final(axis: Axes, comparison: Mapping[str, Any]) -> None:
    entries = comparison["entries"]
    names = list(next(iter(entries.values())))
    width = 0.8 / len(names)
    for offset, name in enumerate(names):
        known = [
            (i, e[name]) for i, e in enumerate(entries.values()) if e[name]["mean"] is not None
        ]
        places = [i + (offset - (len(names) - 1) / 2) * width for i, _ in known]
        means = [value["mean"] for _, value in known]
        below = [value["mean"] - value["low"] for _, value in known]
        above = [value["high"] - value["mean"] for _, value in known]
        axis.bar(
            places, means, width, yerr=[below, above], capsize=3, label=NAMES[name], alpha=0.85
        )
    axis.set_xticks(range(len(entries)), list(entries))
    axis.set_ylabel(f"FID, N = {comparison['num_images']:,}")
    axis.set_title(f"fresh seeds, {comparison['repeats']} repeats, 95 % intervals")
    axis.grid(alpha=0.25, axis="y")
    axis.legend(fontsize=8)


DASHES: Final = {"newest": "--", "uniform average": ":", "best single": "-."}


def draw_comparison(document: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the plot of what `compare_searchers` gives; ConfigError without the library."""
    along = document["curve_images"] > 0
    height = max(4.6, 1.6 + 0.42 * len(document["searchers"]))
    with drawing(path, 1, 2 if along else 1, (13.0 if along else 7.5, height)) as axes:
        if along:
            curves(axes[0], document)
        _ends(axes[-1], document)


def window(ends: Sequence[float]) -> tuple[float, float]:
    """The part of the scale to show: all results, and some room where the worse ones came from.

    Merges that are far worse than what was found would leave nothing to see of the differences.
    """
    low, high = min(ends), max(ends)
    span = max(high - low, 0.05 * abs(high))
    bottom = low - 0.3 * span
    return max(bottom, low / 2) if low > 0 else bottom, high + 1.5 * span  # the scale may be log


def _window(document: Mapping[str, Any]) -> tuple[float, float]:
    name = document["headline"]
    values = [v for line in document["searchers"] for v in line["fid"][name]["values"]]
    ends = [value for value in values if value is not None]
    return window(ends) if ends else (0.0, 1.0)


def _fixed_label(entry: str, level: float, limits: tuple[float, float]) -> str:
    inside = limits[0] <= level <= limits[1]
    return entry if inside else f"{entry}: {number(level)}, off the scale"


def curves(axis: Axes, document: Mapping[str, Any]) -> None:
    """FID along the searches of a comparison: median and range over seeds."""
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
