"""Sections of a search's page that show what was scored, searched and found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from merge_rl.config import load_mapping
from merge_rl.storage.runs import RunDir
from merge_rl.workflows.report.elements import badge, figure, heat_table, span_of, strip
from merge_rl.workflows.report.figures import chart, charts
from merge_rl.workflows.report.markup import (
    NAMES,
    NOTHING,
    Safe,
    interval,
    joined,
    listed,
    metric_text,
    section,
    table,
    tag,
)
from merge_rl.workflows.report.plots import gap, progress
from merge_rl.workflows.report.results import outcome
from merge_rl.workflows.report.run_page import optimism_text, search_lines
from merge_rl.workflows.rewards import first_order_line

Found = Mapping[str, Any]
CHART: Final = (6.2, 3.3)  # inches; a screen shows it larger


@dataclass(frozen=True)
class RunFacts:
    """What a run's folder holds, as plain data: of any version, finished or not."""

    path: Path
    settings: Found
    events: Sequence[Found]
    result: Found | None
    inputs: Found
    text: str  # of config.yaml

    @classmethod
    def of(cls, run: RunDir) -> RunFacts:
        """Read it; RunError names a file that is damaged."""
        return cls(
            path=run.path,
            settings=load_mapping(run.config_path),
            events=run.events(),
            result=run.read("result.json"),
            inputs=run.read("inputs.json") or {},
            text=run.config_path.read_text(encoding="utf-8"),
        )

    @property
    def comparison(self) -> Found | None:
        """Scores on fresh seeds, where the run got so far."""
        found: Found | None = (self.result or {}).get("comparison")
        return found

    def setting(self, *keys: str) -> Any:
        """A setting by its place; None where this run has none."""
        value: Any = self.settings
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


def scores(run: RunFacts) -> Safe:
    """Start, baselines and result on the same fresh seeds."""
    comparison = run.comparison
    if comparison is None:
        return NOTHING
    head, single = comparison["headline"], comparison["best_single"]
    rows = _entry_rows(comparison["entries"], head, single, comparison["gain_over"])
    extractor = run.setting("extractor")
    of = f" of {extractor} features" if extractor else ""
    unseen = " and never saw the held-out real images" if head == "heldout" else ""
    note = (
        f"FID{of}, lower is better: mean [95 % interval] of {comparison['repeats']} repeats of "
        f"{comparison['num_images']:,} images, on seeds that nothing was chosen by. It falls with "
        "the number of images, so compare at equal numbers. The search optimised against the "
        f"reference{unseen}. Dots are the repeats of the {NAMES[head]} FID."
    )
    columns = [*_columns(comparison["entries"], head), "result is"]
    return section("Scores on fresh seeds", table(columns, rows, kind="wide"), note=note)


def _columns(entries: Found, head: str) -> list[str]:
    names = [head, *(name for name in next(iter(entries.values())) if name != head)]
    return ["model", *(f"{NAMES[name]} FID" for name in names), ""]


def _entry_rows(entries: Found, head: str, single: str, gains: Found) -> list[list[str]]:
    span = span_of([value[head] for value in entries.values()])
    rows = []
    for entry, value in entries.items():
        others = [name for name in value if name != head]
        label = f"best single ({single})" if entry == "best single" else entry
        shown = tag("span", label, class_="own") if entry == "result" else label
        verdict = badge(outcome(gains[entry])) if entry in gains else NOTHING
        numbers = [interval(value[name]) for name in (head, *others)]
        rows.append([shown, *numbers, strip(value[head], span), verdict])
    return rows


def searched(run: RunFacts) -> Safe:
    """Curves along the rounds, and where the search began, what it chose, what it cost."""
    shown, levels = run.events, _levels(run)
    if not shown:
        return NOTHING
    text = "The pool holds images of the policy's mean; it follows the search with a delay."
    if any(event.get("heldout") is not None for event in shown):
        text += " Where the held-out curve does not follow, the gain is one of the reference."
    if levels:
        text += f" Lines across: {' and '.join(_across(levels))}."
    drawn = chart(lambda axes: progress(axes[0], shown, levels), CHART, "distance along the search")
    found = [figure(drawn, text)]
    if any(event.get("gap") is not None for event in shown):
        drawn = chart(lambda axes: gap(axes[0], shown), CHART, "gap along the search")
        text = "How far fresh images would move the pool: above 0 it flatters the search."
        found.append(figure(drawn, text))
    said = listed(search_lines(run.result)) if run.result else NOTHING
    return section("The search", charts(*found), said)


FLOOR: Final = "floor: real against real"


def _across(levels: Mapping[str, float]) -> list[str]:
    """What the lines of the chart are."""
    merges = ["merges that need no search"] if levels.keys() - {FLOOR} else []
    return [*merges, *(["real images against real ones"] if FLOOR in levels else [])]


def _levels(run: RunFacts) -> dict[str, float]:
    """Scores to compare the curve with: of as many images as the pool has alone."""
    comparison = run.comparison
    if comparison is None:
        return {}
    levels: dict[str, float] = {}
    head = comparison["headline"]
    if comparison["num_images"] == run.setting("reward", "pool_size"):
        for entry in ("start", "uniform", "best single"):
            mean = comparison["entries"][entry][head]["mean"]
            levels |= {} if mean is None else {entry: mean}
    floor = comparison.get("floor")
    return levels if floor is None else {**levels, FLOOR: floor}


def coefficients(run: RunFacts) -> Safe:
    """What every checkpoint is multiplied by, in every group of tensors."""
    result = run.result
    if result is None:
        return NOTHING
    start, found = result["start"]["coefficients"], result["coefficients"]
    common = {"start": start[0]} if all(row == start[0] for row in start) else {}
    groups = common | dict(zip(result["groups"], found, strict=True))
    rows = {name: [*row, sum(row)] for name, row in groups.items()}
    corner, columns = "group", [*result["checkpoints"], "sum"]
    if len(groups) <= len(columns):  # the longer side runs down the page
        turned = zip(columns, zip(*rows.values(), strict=True), strict=True)
        corner, columns, rows = "checkpoint", list(rows), {name: [*row] for name, row in turned}
    note = (
        "What each checkpoint is multiplied by, in every group of tensors; blue adds, orange "
        f"takes away. The search began at {result['start']['label']}."
    )
    drawn = heat_table(corner, columns, rows, apart={*common, "sum"})
    return section("Coefficients", drawn, note=note)


def second_opinions(run: RunFacts) -> Safe:
    """What other metrics, samplers and seeds say of the gain."""
    comparison = run.comparison
    if run.result is None or comparison is None:
        return NOTHING
    parts, second = [], comparison.get("second")
    if second is not None:
        gain = second["gain_over_start"]
        rows = [[k, interval(v, ".4g")] for k, v in second["entries"].items()]
        rows.append(["gained", interval(gain, "+.4g")])
        name = metric_text(second["metric"])
        parts.append(table([f"{name} to the reference", "mean [95 % interval]"], rows))
        parts.append(tag("p", f"By {name}, which no step optimised: ", badge(outcome(gain))))
    else:
        text = "No second metric: the statistics of real data keep no features of single images."
        parts.append(tag("p", text))
    return section("Second opinions", *parts, _under_sde(comparison), listed(_notes(run)))


def _under_sde(comparison: Found) -> Safe:
    sde, head = comparison.get("sde"), comparison["headline"]
    if sde is None:
        return NOTHING
    rows = _entry_rows(sde["entries"], head, "", sde["gain_over"])
    said = f"Under the SDE, {sde['sampler']['solver']} with {sde['sampler']['num_steps']} steps:"
    columns = [*_columns(sde["entries"], head), "result is"]
    return joined([tag("p", said), table(columns, rows, kind="wide")])


def _notes(run: RunFacts) -> list[str]:
    result = run.result or {}
    final, notes = result["final"], []
    if final.get("optimism") is not None:
        notes.append(
            f"Optimism of the final choice: {optimism_text(final)} (its FID less the start's on "
            "the seeds that it was chosen by, minus that on fresh ones)."
        )
    return [*notes, *first_order_line(run.events)]
