"""The page of a comparison of searchers, for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from merge_rl.errors import ConfigError
from merge_rl.progress import counted, number
from merge_rl.storage.files import write_text
from merge_rl.workflows.report.markup import (
    NAMES,
    Row,
    floor_lines,
    interval,
    markdown_table,
    metric_text,
)
from merge_rl.workflows.report.plots import draw_comparison
from merge_rl.workflows.report.results import compare_verdict, ranged

COST_LEGEND: Final = (
    "network calls: images times evaluations an image; an image with its gradient is three",
    "overhead: share of the time outside sampling and features",
    "spread: standard deviation of a coefficient over seeds, median; max |c|: the largest",
)


def quality_table(document: Mapping[str, Any]) -> tuple[list[str], list[Row]]:
    """Columns and rows, a searcher each, of how good its results are."""
    names = _references(document)
    rows = [
        [
            line["searcher"],
            *(ranged(line["fid"][name]) for name in names),
            *(ranged(value, ".3g") for value in line.get("others", {}).values()),
            _shown(line["ratio"], ".3f"),
            _shown(line["optimism"], "+.3f"),
        ]
        for line in document["searchers"]
    ]
    heads = [f"{NAMES[name]} FID" for name in names] + others_of(document)
    return ["searcher", *heads, "ratio", "optimism"], rows


def others_of(document: Mapping[str, Any]) -> list[str]:
    """The metrics beside FID; those of an earlier release have none."""
    return [metric_text(name) for name in document["searchers"][0].get("others", {})]


def _references(document: Mapping[str, Any]) -> list[str]:
    """The one to judge by first."""
    return ["heldout", "reference"] if document["headline"] == "heldout" else ["reference"]


def cost_table(document: Mapping[str, Any]) -> tuple[list[str], list[Row]]:
    """Columns and rows, a searcher each, of what it takes and how much seeds matter to it."""
    rows = [
        [
            line["searcher"],
            f"{line['images']:,}",
            _shown(line.get("evaluations"), ","),
            _shown(line["seconds"], ".0f"),
            _shown(line["overhead"], ".1%"),
            _shown(line["coefficient_spread"], ".3f"),
            _shown(line["largest_coefficient"], ".2f"),
        ]
        for line in document["searchers"]
    ]
    return ["searcher", "images", "network calls", "seconds", "overhead", "spread", "max |c|"], rows


def fixed_table(document: Mapping[str, Any]) -> tuple[list[str], list[Row]]:
    """Columns and rows of the merges that cost no search: mean [95 % interval]."""
    names = _references(document)
    rows = []
    for name, entry in document["fixed"].items():
        label = f"{name} ({document['best_single']})" if name == "best single" else name
        others = (interval(value, ".3g") for value in entry.get("others", {}).values())
        rows.append([label, *(interval(entry["fid"][key]) for key in names), *others])
    return ["no search", *(f"{NAMES[name]} FID" for name in names), *others_of(document)], rows


def title(document: Mapping[str, Any]) -> str:
    """What the numbers of the table of searchers are."""
    seeds = len(document["seeds"])
    which = f"median [range] of {seeds} seeds" if seeds > 1 else "one seed"
    return (
        f"budget {document['budget']:,} images, {which}; FID at N = {document['num_images']:,}, "
        f"mean of {document['repeats']} repeats on shared fresh seeds"
    )


def legend(document: Mapping[str, Any]) -> list[str]:
    """Sentences that explain all columns."""
    return [*quality_legend(document), *COST_LEGEND]


def quality_legend(document: Mapping[str, Any]) -> list[str]:
    """Sentences that explain the columns of `quality_table`, and name what is not in it."""
    free, baseline = document["best_free"], document["best_baseline"]
    lines = []
    if free:
        lines.append(
            f"ratio: to the best merge without a search, {free['entry']} ({number(free['fid'])})"
        )
    if baseline and free and baseline["entry"] != free["entry"]:
        lines.append(
            f"the best of the simple searchers is {baseline['entry']} ({number(baseline['fid'])})"
        )
    lines += [
        "optimism: lead of a final choice by its own seeds against fresh ones, below 0: flattered",
        *floor_lines(document),
    ]
    return [*lines, *(f"left out: {text}" for text in document["left_out"])]


def markdown(document: Mapping[str, Any], picture: str | None = None) -> str:
    """All of it as one document; `picture` is the plot's file name."""
    count = len(document["checkpoints"])
    parts = [
        "# Comparison of searchers",
        f"**{compare_verdict(document)}**",
        f"{counted(count, 'checkpoint')}, {title(document)}.",
    ]
    tables = (quality_table, fixed_table, cost_table)
    parts += [markdown_table(*table(document)) for table in tables]
    parts.append("\n".join(f"- {line}" for line in legend(document)))
    if picture:
        parts.append(f"![FID along the searches]({picture})")
    return "\n\n".join(parts) + "\n"


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def write_comparison(document: Mapping[str, Any], folder: Path) -> str | None:
    """Write table and plot; a sentence where the plot could not be drawn."""
    note = None
    picture: str | None = "compare.png"
    try:
        draw_comparison(document, folder / "compare.png")
    except ConfigError as error:
        picture, note = None, str(error)
    write_text(folder / "compare.md", markdown(document, picture))
    return note
