"""The page of a search as HTML, from what its folder holds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from merge_rl.config import OptimizeConfig
from merge_rl.errors import quoted
from merge_rl.progress import counted, number
from merge_rl.storage.runs import RunDir
from merge_rl.workflows.report.elements import TITLES, before_after, facts, headline, pictured
from merge_rl.workflows.report.markup import (
    NAMES,
    Safe,
    document,
    interval,
    joined,
    section,
    tag,
)
from merge_rl.workflows.report.results import run_verdict
from merge_rl.workflows.report.run_page import costs
from merge_rl.workflows.report.run_sections import (
    Found,
    RunFacts,
    coefficients,
    scores,
    searched,
    second_opinions,
)
from merge_rl.workflows.report.sections import (
    again_section,
    attempted,
    cost_section,
    footer,
    provenance_section,
    settings_section,
    shown_path,
    warned,
)
from merge_rl.workflows.rewards import first_order_warnings


def run_document(run: RunDir, *, reloads: bool = False) -> str:
    """The whole page; one that `reloads` does so until the run is finished."""
    facts_ = RunFacts.of(run)
    name = Path(str(facts_.settings.get("checkpoints", run.path))).name
    builders = {
        "Verdict": _headline, "Before and after": _pictures, "Scores on fresh seeds": scores,
        "The search": searched, "Coefficients": coefficients, "Second opinions": second_opinions,
        "Cost and time": _cost,
        "Settings": lambda run: settings_section(OptimizeConfig, run.settings),
        "Provenance": lambda run: provenance_section(run.inputs, run.settings),
        "Make it again": _again,
    }  # fmt: skip
    parts = [attempted(title, partial(build, facts_)) for title, build in builders.items()]
    unfinished = facts_.result is None
    return document(f"Merge of {name}", *parts, footer(), reloads=reloads and unfinished)


def _headline(run: RunFacts) -> Safe:
    result, comparison = run.result, run.comparison
    name = Path(str(run.settings.get("checkpoints", run.path))).name
    count = len(result["checkpoints"]) if result else len(run.inputs["hashes"]["checkpoints"])
    context = (
        f"Merge of {counted(count, 'checkpoint')} of {name}, {run.setting('search', 'name')} with "
        f"{run.setting('reward', 'name') or 'its usual reward'}, seed {run.settings.get('seed')}"
    )
    if comparison is not None:
        top = headline(run_verdict(comparison), "", context)
        return joined([top, _tiles(run, comparison), warned(_warnings(run))])
    if result is not None:
        return headline(None, "A finished search without a final comparison.", context)
    return joined([headline(None, _so_far(run), context), _to_go(run)])


def _tiles(run: RunFacts, comparison: Found) -> Safe:
    head = comparison["headline"]
    means = {e: number(v[head]["mean"]) for e, v in comparison["entries"].items()}
    return facts(
        {
            f"{NAMES[head]} FID before": means["start"],
            f"{NAMES[head]} FID after": means["result"],
            "gained [95 % interval]": interval(comparison["gain_over"]["start"], "+.3f"),
            "images searched with": f"{(run.result or {})['search_images']:,}",
        }
    )


def _so_far(run: RunFacts) -> str:
    if not run.events:
        return "Not finished: no round is over yet."
    last = run.events[-1]
    ended = all(event.get("failed") == len(event["rewards"]) for event in run.events[-3:])
    failing = " The last rounds failed: no candidate made finite samples." if ended else ""
    done = f"{counted(len(run.events), 'round')}, {last['images']:,} images"
    return f"Not finished: {done} so far.{failing}"


def _to_go(run: RunFacts) -> Safe:
    done = run.events[-1]["images"] if run.events else 0
    budget = run.setting("budget") or 1
    bar = tag("progress", value=min(done, budget), max=budget)
    path = quoted(shown_path(run.path))
    return joined([bar, tag("p", f"If it was stopped: mergerl resume {path}")])


def _warnings(run: RunFacts) -> list[str]:
    return [*(run.result or {}).get("warnings", []), *first_order_warnings(run.events)]


def _pictures(run: RunFacts) -> Safe:
    comparison = run.comparison
    captions = {}
    if comparison is not None:
        head = comparison["headline"]
        for entry in ("start", "result"):
            value = interval(comparison["entries"][entry][head])
            captions[entry] = f"{NAMES[head]} FID {value}"
    found = before_after(run.path, captions)
    if found:
        return section("Before and after", found, note="The same seeds and classes on both sides.")
    why = "the run is not finished" if run.result is None else "this run kept none"
    return section("Before and after", tag("p", f"There are no pictures: {why}.", class_="note"))


def _cost(run: RunFacts) -> Safe:
    result, comparison = run.result, run.comparison
    sentences = costs(run.events)
    if result is None:
        return cost_section({}, sentences)
    start, final = result["start"]["images"], result["final"]["images"]
    images = {
        "to find the start": start,
        "rounds": result["search_images"] - start - final,
        "final choice": final,
        "a fresh look at it": result["final"].get("again_images", 0),  # earlier runs do not say it
    }
    if comparison is not None:
        repeated = comparison["num_images"] * comparison["repeats"]
        entries = len(comparison["entries"]) + len((comparison.get("sde") or {}).get("entries", ()))
        selection = (run.setting("evaluation", "selection_images") or 0) * len(
            result["checkpoints"]
        )
        images["final comparison"] = entries * repeated + selection
    shown = pictured(run.path)
    images["pictures"] = len(TITLES) * len(shown["labels"]) if shown else 0
    kept = {name: count for name, count in images.items() if count}
    said = f"{sum(kept.values()):,} images in all, in {counted(result['rounds'], 'round')}"
    return cost_section(kept, [said, *sentences])


def _again(run: RunFacts) -> Safe:
    checkpoints, path = shown_path(run.settings["checkpoints"]), shown_path(run.path)
    search = ["mergerl", "optimize", checkpoints, "--config", f"{path}/config.yaml"]
    commands: list[tuple[str, Sequence[object]]] = [
        ("The search, to the same bits on the same machine:", [*search, "--out", f"{path}-again"])
    ]
    recipe = f"{path}/merged/merge.yaml"
    if (run.path / "merged/merge.yaml").is_file():
        merge = ["mergerl", "merge", checkpoints, "merged", "--recipe", recipe]
        commands.append(("The model alone, byte for byte on any machine:", merge))
    return again_section(commands, "config.yaml", run.text)
