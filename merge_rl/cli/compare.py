"""`mergerl compare`: several searchers, several seeds, one budget, one table; `mergerl report`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from merge_rl.cli.optimize import NO_SDE, Checkpoints
from merge_rl.cli.options import build_for_set, integer, meant_set, with_settings
from merge_rl.cli.output import (
    JsonFlag,
    ProgressTracker,
    escape,
    note,
    note_unused_gpu,
    print_json,
    say,
    stoppable,
    tell,
)
from merge_rl.cli.results import there, write_page
from merge_rl.cli.tables import print_table
from merge_rl.config import SCORES, SEARCH, OptimizeConfig, numbers_in, whole_number
from merge_rl.errors import ConfigError

if TYPE_CHECKING:
    from merge_rl.workflows.report import Report

WATCH_SECONDS: Final = 5.0
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
            show_default="pathwise, policy-gradient, nevergrad:TBPSA, nevergrad:CMA, lcsc, the "
            "last three with reward.name=fid-subset too, greedy-soup, ema-grid, best-checkpoint, "
            "uniform",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option(help="Seeds of the searches.", rich_help_panel=SEARCH)
    ] = "0,1,2",
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
    table has the FID of what they found, the images and the time they took, and how much their
    coefficients differ between seeds; the plot shows how FID falls with the images generated.
    Ctrl-C keeps what is done; the same command goes on.

    [bold]mergerl compare digits/edm2 --searcher pathwise --searcher nevergrad:CMA[/bold]
    """
    checkpoints = meant_set(checkpoints)
    config, _ = build_for_set(settings, checkpoints)
    folder = out or Path("runs") / f"{checkpoints.resolve().name}-compare"
    note_unused_gpu(config.device)
    document = _run(config, folder, searcher, parse_seeds(seeds), curve_images, json=json)
    if json:
        print_json({"out": str(folder), **document})
    else:
        print_comparison(document)
        written = there(folder, "report.html", "compare.md", "compare.json")
        tell(f"all of it in {folder}: {', '.join(written)}, and a folder a search")
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

    done = f"what is done is kept in {folder}. Go on: the same command"
    with stoppable(folder.is_dir, done), ProgressTracker(quiet=json) as tracker:
        document = compare_searchers(
            settings, out=folder, searchers=searchers, seeds=seeds, curve_images=curve_images,
            tracker=tracker,
        )  # fmt: skip
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
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Write it anew until the run is finished; it reloads itself."),
    ] = False,
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Write the page of a run, a fine-tuning run or a comparison: RUN/report.html.

    One file to look at and to send on: verdict, pictures, scores with intervals, curves,
    coefficients, cost, settings, hashes, and the command that makes it again. Markdown and plots
    lie beside it. An unfinished run is reported as far as it has come.
    """
    from merge_rl.storage.runs import find_run

    run = find_run(run).told(note)
    written = _watched(run) if watch else write_page(run)
    if json:
        paths = {"page": written.page, "picture": written.picture, "html": written.html}
        shown = {name: path and str(path) for name, path in paths.items()}
        print_json({"run": str(run), **shown, "comparison": written.comparison})
        return
    if written.comparison is not None:
        print_comparison(written.comparison)
    beside = [str(path) for path in (written.page, written.picture) if path]
    tell(f"wrote {written.html}" + (f", beside it {' and '.join(beside)}" if beside else ""))


def _watched(run: Path) -> Report:
    from merge_rl.workflows.report import write_report

    written = write_page(run, reloads=True)
    if not written.finished:
        say(f"{escape(str(written.html))} follows the run; Ctrl-C ends this")
    try:
        while not written.finished:
            time.sleep(WATCH_SECONDS)
            written = write_report(run, reloads=True)
    except KeyboardInterrupt:
        written = write_report(run)  # which nobody writes anew: it reloads itself no longer
    return written


def parse_seeds(text: str) -> list[int]:
    """Seeds from "0,1,2"; ConfigError for what is no whole number."""
    seeds = numbers_in(text, whole_number)
    if seeds is None:
        raise ConfigError(f"expected --seeds such as 0,1,2, got {text!r}")
    return seeds
