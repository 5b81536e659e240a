"""`mergerl compare`: several searchers, several seeds, one budget, one table; `mergerl report`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.markup import escape

from merge_rl.cli.optimize import NO_SDE, Checkpoints
from merge_rl.cli.options import build_for_set, integer, with_settings
from merge_rl.cli.output import (
    JsonFlag,
    ProgressTracker,
    note,
    note_unused_gpu,
    print_json,
    print_table,
    say,
    stoppable,
    tell,
)
from merge_rl.config import SCORES, SEARCH, OptimizeConfig, numbers_in, whole_number
from merge_rl.errors import ConfigError

# What searchers differ in is said with each of them; the others are of one search.
WITHOUT: Final = (*NO_SDE, "search", "merge", "reward", "select", "weights_device", "licence")


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(compare)
    app.command()(report)


@with_settings(OptimizeConfig, without=WITHOUT)
def compare(
    checkpoints: Checkpoints,
    *,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the comparison.", show_default="runs/NAME-compare"),
    ] = None,
    settings: Mapping[str, Any],
    searcher: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'NAME [KEY=VALUE ...]'",
            help="Repeatable. Settings of its own are search.*, merge.* and reward.*, and "
            "label=TEXT names it in tables.",
            show_default="policy-gradient, nevergrad:TBPSA, nevergrad:CMA, lcsc, greedy-soup, "
            "ema-grid, best-checkpoint, uniform",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Of the searches.", rich_help_panel=SEARCH)] = "0,1,2",
    curve_images: Annotated[
        int | None,
        typer.Option(
            parser=integer,
            help="N of the six scores along each search, 0 for none.",
            show_default="N, 2000 at most",
            rich_help_panel=SCORES,
        ),
    ] = None,
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Compare searchers: all with the same budget, scored on the same fresh seeds.

    Every searcher searches with every seed of --seeds; --seed is that of the fresh images. The
    table tells the FID of what they found, the images and the time they took, and how much their
    coefficients differ between seeds; the plot how FID falls with the images generated. Ctrl-C
    keeps what is done: the same command goes on.
    """
    from merge_rl.storage.runs import find_set

    checkpoints = find_set(checkpoints).told(note)
    config = build_for_set(settings, checkpoints)
    folder = out or Path("runs") / f"{checkpoints.resolve().name}-compare"
    note_unused_gpu(config.device)
    document = _run(config, folder, searcher, parse_seeds(seeds), curve_images, json=json)
    if json:
        print_json({"out": str(folder), **document})
    else:
        print_comparison(document)
        tell(f"all of it in {folder}: compare.md, compare.json, and a folder a search")
        _print_verdict(document)


def _run(
    settings: OptimizeConfig,
    folder: Path,
    searchers: list[str] | None,
    seeds: list[int],
    curve_images: int | None,
    *,
    json: bool,
) -> dict[str, Any]:
    from merge_rl.workflows.compare import compare_searchers
    from merge_rl.workflows.report import write_comparison

    done = f"what is done is kept in {folder}. Go on: the same command"
    with stoppable(folder.is_dir, done), ProgressTracker(quiet=json) as tracker:
        document = compare_searchers(
            settings, out=folder, searchers=searchers, seeds=seeds, curve_images=curve_images,
            tracker=tracker,
        )  # fmt: skip
    note = write_comparison(document, folder)
    if note:
        say(f"no plot: {escape(note)}")
    return document


def print_comparison(document: Mapping[str, Any]) -> None:
    """The tables on stdout."""
    from merge_rl.workflows.report import compare_page as text

    print_table(text.title(document), *text.quality_table(document))
    for table in (text.fixed_table, text.cost_table):
        print_table("", *table(document))
    for line in text.legend(document):
        tell(line)


def _print_verdict(document: Mapping[str, Any]) -> None:
    from merge_rl.workflows.report import compare_verdict

    tell(compare_verdict(document).line)


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run directory, or folder of a comparison.")
    ],
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Write the page and the plot of a run: RUN/report.md and report.png.

    Scores with intervals, where the search began and what it chose, images spent, coefficients.
    Of a comparison: its tables again, compare.md and compare.png.
    """
    from merge_rl.storage.runs import find_run
    from merge_rl.workflows.report import write_report

    run = find_run(run).told(note)
    written = write_report(run)
    if written.note:
        say(f"no plot: {escape(written.note)}")
    if json:
        paths = {"page": str(written.page), "picture": written.picture and str(written.picture)}
        print_json({"run": str(run), **paths, "comparison": written.comparison})
        return
    if written.comparison is not None:
        print_comparison(written.comparison)
    typer.echo(f"wrote {written.page}" + (f" and {written.picture}" if written.picture else ""))


def parse_seeds(text: str) -> list[int]:
    """Seeds from "0,1,2"; ConfigError for what is no whole number."""
    seeds = numbers_in(text, whole_number)
    if seeds is None:
        raise ConfigError(f"expected --seeds such as 0,1,2, got {text!r}")
    return seeds
