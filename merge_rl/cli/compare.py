"""`mergerl compare`: several searchers, several seeds, one budget, one table; `mergerl report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from merge_rl.cli import options
from merge_rl.cli.options import FINAL, MODEL, SEARCH
from merge_rl.cli.output import (
    JsonFlag,
    ProgressTracker,
    note_unused_gpu,
    print_json,
    print_table,
    say,
    stoppable,
)
from merge_rl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from merge_rl.config import OptimizeConfig


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(compare)
    app.command()(report)


def compare(
    checkpoints: options.Checkpoints,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the comparison. \\[default: runs/NAME-compare]"),
    ] = None,
    config: options.Config = None,
    setting: options.Setting = None,
    track: options.Track = None,
    searcher: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'NAME [KEY=VALUE ...]'",
            help="Repeatable. Settings of its own are search.*, merge.* and reward.*, and "
            "label=TEXT names it in tables. \\[default: policy-gradient, nevergrad:TBPSA, "
            "nevergrad:CMA, lcsc, greedy-soup, ema-grid, best-checkpoint, uniform]",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Of the searches.", rich_help_panel=SEARCH)] = "0,1,2",
    budget: options.Budget = None,
    extractor: options.Extractor = None,
    extractor_weights: options.ExtractorWeights = None,
    reference: options.Reference = None,
    heldout: options.Heldout = None,
    autoencoder: options.Autoencoder = None,
    autoencoder_weights: options.AutoencoderWeights = None,
    solver: options.Solver = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    guide: options.Guide = None,
    fast: options.Fast = False,
    batch: Annotated[
        int | None, typer.Option(help="Images in one forward pass.", rich_help_panel=MODEL)
    ] = None,
    device: options.Device = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of the fresh images all results are scored on. \\[default: 0]",
            rich_help_panel=FINAL,
        ),
    ] = None,
    final_images: options.FinalImages = None,
    repeats: options.Repeats = None,
    curve_images: Annotated[
        int | None,
        typer.Option(
            help="N of the six scores along each search, 0 for none. \\[default: N, 2000 at most]",
            rich_help_panel=FINAL,
        ),
    ] = None,
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Compare searchers: all with the same budget, scored on the same fresh seeds.

    Every searcher searches with every seed. The table tells the FID of what they found, the images
    and the time they took, and how much their coefficients differ between seeds; the plot how FID
    falls with the images generated. Ctrl-C keeps what is done: the same command goes on.
    """
    from merge_rl.cli.options import build_config
    from merge_rl.storage.checkpoints import open_checkpoints

    given = options.shared_settings(
        track=track, budget=budget, seed=seed, extractor=extractor,
        extractor_weights=extractor_weights, reference=reference, heldout=heldout,
        autoencoder=autoencoder, autoencoder_weights=autoencoder_weights, solver=solver,
        steps=steps, guidance=guidance, guide=guide, fast=fast, batch=batch, device=device,
        final_images=final_images, repeats=repeats,
    )  # fmt: skip
    defaults = open_checkpoints(checkpoints, track=track).defaults
    settings = build_config(
        checkpoints, config, given, overrides=setting or [], sampler=defaults.sampler
    )
    folder = out or Path("runs") / f"{checkpoints.resolve().name}-compare"
    note_unused_gpu(settings.device)
    document = _run(settings, folder, searcher, parse_seeds(seeds), curve_images, json=json)
    if json:
        print_json({"out": str(folder), **document})
    else:
        print_comparison(document)
        typer.echo(f"all of it in {folder}: compare.md, compare.json, and a folder a search")


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
        typer.echo(line)


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
    from merge_rl.workflows.report import write_report

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
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"expected --seeds such as 0,1,2, got {text!r}") from None
