"""The page of a comparison of searchers as HTML, finished or not."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from merge_rl.config import OptimizeConfig, SearchConfig
from merge_rl.errors import RunError
from merge_rl.progress import counted, number
from merge_rl.storage.runs import SETTINGS, RunDir
from merge_rl.workflows.report.compare_page import COST_LEGEND, cost_table, quality_legend, title
from merge_rl.workflows.report.elements import figure, headline, span_of, strip, value_or_dash
from merge_rl.workflows.report.figures import chart, charts
from merge_rl.workflows.report.markup import (
    NAMES,
    NOTHING,
    Row,
    Safe,
    document,
    interval,
    joined,
    listed,
    section,
    table,
    tag,
)
from merge_rl.workflows.report.plots import curves
from merge_rl.workflows.report.results import compare_verdict, ranged, ranked
from merge_rl.workflows.report.sections import (
    again_section,
    attempted,
    footer,
    provenance_section,
    settings_section,
    shown_path,
)

Found = Mapping[str, Any]
CHART: Final = (7.4, 4.4)  # inches
FILE: Final = "compare.yaml"


def compare_document(folder: RunDir, *, reloads: bool = False) -> str:
    """The whole page; one that `reloads` does so until the comparison is finished."""
    begun, found = folder.read(SETTINGS) or {}, folder.read("compare.json")
    shared = begun["settings"]["config"]
    name = Path(str(shared.get("checkpoints", folder.path))).name
    # Every searcher has a name of its own.
    common = {**shared, "search": {**shared.get("search", {}), "name": SearchConfig().name}}
    parts = [attempted("Verdict", partial(_headline, folder, found, name))]
    if found is not None:
        builders = {"Ranking": _ranking, "Along the search": _along, "Cost to reach": _reach}
        builders["Cost and time"] = _cost
        parts += [attempted(text, partial(build, found)) for text, build in builders.items()]
    parts += [
        attempted("Settings", partial(settings_section, OptimizeConfig, common)),
        attempted("Provenance", partial(_provenance, begun, shared)),
        attempted("Make it again", partial(_again, folder.path, begun, found)),
    ]
    heading = f"Searchers compared on {name}"
    return document(heading, *parts, footer(), reloads=reloads and found is None)


def _headline(folder: RunDir, found: Found | None, name: str) -> Safe:
    if found is None:
        text = "Not finished: some searches are still to come."
        go_on = tag("p", "If it was stopped, the command that began it goes on.")
        top = headline(None, text, f"Comparison of searchers on {name}")
        return joined([top, go_on, _so_far(folder.path)])
    count = len(found["searchers"])
    searched = counted(len(found["checkpoints"]), "checkpoint")
    context = f"{counted(count, 'searcher')} on {searched} of {name}: {title(found)}"
    return headline(compare_verdict(found), "", context)


def _so_far(folder: Path) -> Safe:
    """What there is of each search."""
    rows = []
    for path in sorted(folder.iterdir()):
        if not (path / "config.yaml").is_file():
            continue
        run = RunDir(path)
        try:
            events, done = run.events(), run.read("result.json") is not None
        except RunError as error:
            rows.append([path.name, "", "", str(error)])
            continue
        images = f"{events[-1]['images']:,}" if events else "0"
        rows.append([path.name, str(len(events)), images, "finished" if done else "unfinished"])
    return section(
        "Searches so far", table(["search", "rounds", "images", ""], rows) if rows else ""
    )


def _references(found: Found) -> list[str]:
    return ["heldout", "reference"] if found["headline"] == "heldout" else ["reference"]


def _ranking(found: Found) -> Safe:
    head, names = found["headline"], _references(found)
    lines = ranked(found)
    free = {name: entry["fid"] for name, entry in found["fixed"].items()}
    span = span_of([*(line["fid"][head] for line in lines), *(fid[head] for fid in free.values())])
    rows = []
    for place, line in enumerate(lines, 1):
        fid = line["fid"]
        numbers = [ranged(fid[name]) for name in names]
        shown = strip(fid[head], span, middle="median")
        name = tag("span", f"{place}. {line['searcher']}", class_="own" if place == 1 else None)
        extra = [value_or_dash(line["ratio"]), value_or_dash(line["optimism"], "+.3f")]
        rows.append([name, *numbers, shown, *extra])
    for name, value in free.items():
        label = f"{name} ({found['best_single']})" if name == "best single" else name
        rows.append([label, *(interval(value[n]) for n in names), strip(value[head], span), "", ""])
    fids = [f"{NAMES[name]} FID" for name in names]
    drawn = table(["searcher", *fids, "", "ratio", "optimism"], rows, kind="wide")
    note = (
        "Searchers: median [range] over seeds, a dot a seed. Merges without a search: mean [95 % "
        "interval], a dot a repeat."
    )
    return section("Ranking", drawn, listed(quality_legend(found)), note=note)


def _along(found: Found) -> Safe:
    if not found["curve_images"]:
        return NOTHING
    drawn = chart(lambda axes: curves(axes[0], found), CHART, "FID along the searches")
    text = "What each search would have reported after so many images: median and range over seeds."
    return section("Along the search", charts(figure(drawn, text)))


def cost_to_reach(found: Found) -> tuple[list[str], list[Row]]:
    """Columns and rows, a searcher each: images until its median first reaches a level.

    The levels are the best merge without a search and the end of the second-best searcher; all on
    the seeds of the first repeat. A dash: not within the budget.
    """
    head = found["headline"]
    free = [entry["curve"][head] for entry in found["fixed"].values()]
    ends = sorted(_known(line["curve"][-1][head]["median"] for line in found["searchers"]))
    levels = {"the best merge without a search": min(_known(free), default=None)}
    if len(ends) > 1:
        levels["the second-best searcher's end"] = ends[1]
    kept = {name: level for name, level in levels.items() if level is not None}
    rows = [
        [line["searcher"], *(_first(line["curve"], head, level) for level in kept.values())]
        for line in ranked(found)
    ]
    return ["images to reach", *(f"{name} ({number(level)})" for name, level in kept.items())], rows


def _known(values: Any) -> list[float]:
    return [value for value in values if value is not None]


def _first(curve: Sequence[Found], head: str, level: float) -> str:
    for point in curve:
        median = point[head]["median"]
        if median is not None and median <= level:
            return f"{point['images']:,.0f}"
    return "\N{EN DASH}"


def _reach(found: Found) -> Safe:
    if not found["curve_images"]:
        return NOTHING
    points = [f"{point['images']:,.0f}" for point in found["searchers"][0]["curve"]]
    note = f"Searches were looked at after {', '.join(points)} images; a dash: not reached."
    return section("Cost to reach", table(*cost_to_reach(found)), note=note)


def _cost(found: Found) -> Safe:
    return section("Cost and time", table(*cost_table(found)), listed(COST_LEGEND))


def _provenance(begun: Found, shared: Found) -> Safe:
    return provenance_section({"hashes": begun["inputs"], "version": begun.get("version")}, shared)


def _again(path: Path, begun: Found, found: Found | None) -> Safe:
    shared = begun["settings"]["config"]
    command: list[object] = ["mergerl", "compare", shown_path(shared["checkpoints"])]
    command += ["--config", FILE, "--curve-images", begun["settings"]["curve_images"]]
    if found is not None:
        command += ["--seeds", ",".join(map(str, found["seeds"]))]
        for line in found["searchers"]:
            command += ["--searcher", spec_of(line)]
    command += ["--out", f"{shown_path(path)}-again"]
    what = f"The comparison, with the settings below in {FILE}:"
    return again_section([(what, command)], FILE, json.dumps(shared, indent=2, ensure_ascii=False))


def spec_of(line: Found) -> str:
    """A searcher as the command takes it: its name, and what is its own."""
    said = [f"{key}={json.dumps(value)}" for key, value in line["settings"].items()]
    label = [] if line["searcher"] == line["name"] else [f"label={line['searcher']}"]
    return shlex.join([line["name"], *label, *said])
