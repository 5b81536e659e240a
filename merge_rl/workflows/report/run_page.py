"""The page of a run, from what its folder holds: plain data in, Markdown out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from merge_rl.config import OptimizeConfig
from merge_rl.progress import counted, number
from merge_rl.workflows.report.markup import (
    NAMES,
    Row,
    few_columns,
    floor_lines,
    interval,
    markdown_table,
    metric_text,
)
from merge_rl.workflows.report.results import run_verdict
from merge_rl.workflows.rewards import first_order_line, first_order_warnings

Events = Sequence[Mapping[str, Any]]


def run_markdown(
    config: OptimizeConfig, events: Events, result: Mapping[str, Any] | None, picture: str | None
) -> str:
    """All sections; of a run that is not finished, those there is something for."""
    parts = [f"# Merge of {Path(config.checkpoints).name}", _facts(config)]
    if result is None:
        done = "no round"
        if events:
            done = f"{counted(len(events), 'round')}, {events[-1]['images']:,} images"
        parts.append(f"Not finished: {done} so far.")
    else:
        if "comparison" in result:
            parts.append(f"**{run_verdict(result['comparison'])}**")
        warnings = [*result.get("warnings", []), *first_order_warnings(events)]
        parts += [f"**Warning**: {text}." for text in warnings]
        lines = [*search_lines(result), *first_order_line(events), *costs(events)]
        parts.append("\n".join(f"- {line}" for line in lines))
        if "comparison" in result:
            parts += _comparison(result["comparison"])
        parts += _finalists(result["final"])
        parts += _coefficients(result)
    if picture:
        parts.append(f"![the search]({picture})")
    return "\n\n".join(parts) + "\n"


def _facts(config: OptimizeConfig) -> str:
    return (
        f"Searcher {config.search.name} with the reward {config.reward.text}, budget "
        f"{config.budget:,} images, seed {config.seed}."
    )


def costs(events: Events) -> list[str]:
    """Time of the rounds, and the share that went to the search itself, where it was counted."""
    counted = [event for event in events if "rollout_seconds" in event]
    seconds = sum(event["seconds"] for event in counted)
    if seconds <= 0:
        return []
    share = 1 - sum(event["rollout_seconds"] for event in counted) / seconds
    return [f"the rounds took {seconds:,.0f} s, {share:.1%} outside sampling and features"]


def _comparison(comparison: Mapping[str, Any]) -> list[str]:
    names = list(next(iter(comparison["entries"].values())))
    rows: list[Row] = []
    for entry, summary in comparison["entries"].items():
        label = f"{entry} ({comparison['best_single']})" if entry == "best single" else entry
        rows.append([label, *(interval(summary[name]) for name in names)])
    columns = ["model", *(f"{NAMES[name]} FID" for name in names)]
    head = NAMES[comparison["headline"]]
    parts = [
        "## Start, baselines and result on fresh seeds",
        f"N = {comparison['num_images']:,}, {comparison['repeats']} repeats, mean [95 % interval].",
        markdown_table(columns, rows),
        "\n".join(
            f"- result against {other}: {interval(gain, '+.3f')} {head} FID gained"
            for other, gain in comparison["gain_over"].items()
        ),
        *floor_lines(comparison),
    ]
    second = comparison.get("second")
    if second is not None:
        entries = {name: interval(value, ".4g") for name, value in second["entries"].items()}
        parts.append(
            f"{metric_text(second['metric'])} to the reference: start {entries['start']}, result "
            f"{entries['result']}, gained {interval(second['gain_over_start'], '+.4g')}."
        )
    sde = comparison.get("sde")
    if sde is not None:
        rows = [
            [entry, *(interval(summary[name]) for name in names)]
            for entry, summary in sde["entries"].items()
        ]
        parts += ["Under the SDE:", markdown_table(columns, rows)]
    return parts


def _finalists(final: Mapping[str, Any]) -> list[str]:
    rungs = final["rungs"]
    if not rungs:
        return []
    also = final.get("second_rungs", [])  # runs of old have none
    looks = [rung for pair in zip_longest(rungs, also) for rung in pair if rung is not None]
    rows = [
        [label, *("" if label not in look else number(look[label], ".4g") for look in looks)]
        for label in rungs[0]
    ]
    kinds = ("FID", "second metric") if also else ("FID",)
    columns = [f"round {index + 1}, {kind}" for index in range(len(rungs)) for kind in kinds]
    return [
        "## Final choice",
        f"By {' and '.join(kinds)} to the reference; the better half by mean rank goes on, with "
        "other seeds and twice the images.",
        markdown_table(["finalist", *columns], rows),
        f"Chosen: {final['chosen']}, {number(final['score'])} at N = {final['images_each']:,}"
        f"{_fresh(final)}.",
    ]


def _coefficients(result: Mapping[str, Any]) -> list[str]:
    every, begun = result["coefficients"], result["start"]["coefficients"]
    groups, found = few_columns(result["groups"], every)
    _, start = few_columns(result["groups"], begun)
    if all(row == begun[0] for row in begun):  # said once
        results = ["result"] if len(groups) == 1 else groups
        columns, rows = ["checkpoint", "start", *results], [begun[0], *found]
    else:
        heads = [(f"{group}: start", f"{group}: result") for group in groups]
        columns = ["checkpoint", *(text for pair in heads for text in pair)]
        rows = [row for pair in zip(start, found, strict=True) for row in pair]
    table = [
        [name, *(f"{row[index]:+.4f}" for row in rows)]
        for index, name in enumerate(result["checkpoints"])
    ]
    largest = max(abs(value) for row in every for value in row)
    sums = list(dict.fromkeys(f"{sum(row):.4f}" for row in every))
    of = "each group of tensors sums" if len(groups) > 1 else "they sum"
    return [
        "## Coefficients",
        markdown_table(columns, table),
        f"The largest is {largest:.3f} in size; {of} to {', '.join(sums)}.",
    ]


def search_lines(found: Mapping[str, Any]) -> list[str]:
    """Where it began, what was chosen, what it cost; `found` is result.json or a part of it."""
    lines = [_began(found["start"]), _chose(found["final"]), *_tuned(found.get("tuned"))]
    return [*lines, _spent(found)]


def _began(start: Mapping[str, Any]) -> str:
    rungs = start["rungs"]
    if not rungs:
        return f"began at {start['label']}"
    return (
        f"began at {start['label']}, the best of {len(rungs[0])} merges that cost no search "
        f"({_score(start)})"
    )


def _tuned(tuned: Mapping[str, Any] | None) -> list[str]:
    """What was searched beside coefficients, before and after; and what others were compared at."""
    if tuned is None:
        return []
    lines = []
    if "guidance" in tuned["result"]:
        before, after = (_guidance(tuned[entry]["guidance"]) for entry in ("start", "result"))
        lines.append(f"guidance: {before} at the start, {after} in the result")
    if "guide_coefficients" in tuned["result"]:
        moved = tuned["result"]["guide_coefficients"] != tuned["start"]["guide_coefficients"]
        lines.append(f"the guide {'is a merge of its own' if moved else 'is as at the start'}")
    others = "merges that need no search were compared with the guidance of the start, not with "
    return [*lines, f"{others}that of the result"]


def _guidance(values: Mapping[str, Any]) -> str:
    low, high = values["interval"]
    return f"strength {values['strength']:.4g} from {low:.4g} to {high:.4g}"


def _chose(final: Mapping[str, Any]) -> str:
    rungs = final["rungs"]
    if not rungs:
        return f"reports the {final['chosen']}, without a choice among finalists"
    text = f"chose {final['chosen']} of {len(rungs[0])} finalists ({_score(final)}"
    return f"{text}{_fresh(final)})"


def _fresh(final: Mapping[str, Any]) -> str:
    if final["fresh_score"] is None:
        return ""
    return f", {number(final['fresh_score'])} on fresh seeds; optimism {optimism_text(final)}"


def optimism_text(final: Mapping[str, Any]) -> str:
    """The optimism of a choice with its interval, and what its sign says."""
    optimism, bounds = number(final["optimism"], "+.3f"), final.get("optimism_interval")
    if not bounds:  # earlier runs have none
        return f"{optimism}, below 0 where its seeds flattered it"
    low, high = bounds
    said = "its seeds were hard on it" if low > 0 else "not clearly flattered by its seeds"
    if high < 0:
        said = "flattered by its seeds"
    return f"{optimism} [{number(low, '+.3f')}, {number(high, '+.3f')}], {said}"


def _score(winner: Mapping[str, Any]) -> str:
    if winner["score"] is None:
        return "not finite"
    return f"FID {number(winner['score'])} at N = {winner['images_each']:,}"


def _spent(found: Mapping[str, Any]) -> str:
    start, final = found["start"]["images"], found["final"]["images"]
    rounds = found["search_images"] - start - final
    return (
        f"spent {found['search_images']:,} images: {start:,} to find the start, {rounds:,} in "
        f"{counted(found['rounds'], 'round')}, {final:,} on the final choice"
    )
