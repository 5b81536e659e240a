"""`mergerl compare`: several searchers, several seeds, one budget, one table; `mergerl report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from merge_rl.cli.output import JsonFlag, ProgressTracker, print_json, print_table, say
from merge_rl.cli.sampler_options import FAST_HELP, fast_settings
from merge_rl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from merge_rl.config import OptimizeConfig

SEARCH, MODEL, DATA, FINAL = "Search", "Model and sampling", "Real data", "Scores"


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(compare)
    app.command()(report)


def compare(
    checkpoints: Annotated[
        Path,
        typer.Argument(metavar="CKPTS", help="Folder of .safetensors, with or without manifest."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the comparison. \\[default: runs/NAME-compare]"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings; other options override it.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any setting, such as merge.max_abs=2."),
    ] = None,
    track: Annotated[
        str | None, typer.Option(help="Series of the manifest to use. \\[default: all]")
    ] = None,
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
    budget: Annotated[
        int | None,
        typer.Option(
            help="Images each search may generate. \\[default: 50000]", rich_help_panel=SEARCH
        ),
    ] = None,
    extractor: Annotated[
        str | None, typer.Option(help="Feature extractor.", rich_help_panel=DATA)
    ] = None,
    extractor_weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH",
            help="Its weights; with NAME those of another extractor of the reward.",
            rich_help_panel=DATA,
        ),
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH",
            help="Statistics of real data to optimise against; with NAME for another extractor.",
            rich_help_panel=DATA,
        ),
    ] = None,
    heldout: Annotated[
        Path | None,
        typer.Option(help="Statistics of real data kept for the table.", rich_help_panel=DATA),
    ] = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(
            help="What makes images of latents: sd-vae-edm2 or sd-vae-sit.", rich_help_panel=MODEL
        ),
    ] = None,
    autoencoder_weights: Annotated[
        str | None,
        typer.Option(help="Its weights: file, folder, or public name.", rich_help_panel=MODEL),
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(help="Any but the adaptive, such as heun.", rich_help_panel=MODEL),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Solver intervals.", rich_help_panel=MODEL)
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Strength; 1 is off.", rich_help_panel=MODEL)
    ] = None,
    guide: Annotated[
        Path | None, typer.Option(help="The weaker network.", rich_help_panel=MODEL)
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help=FAST_HELP, rich_help_panel=MODEL)] = False,
    batch: Annotated[
        int | None, typer.Option(help="Images in one forward pass.", rich_help_panel=MODEL)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...", rich_help_panel=MODEL)
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of the fresh images all results are scored on. \\[default: 0]",
            rich_help_panel=FINAL,
        ),
    ] = None,
    final_images: Annotated[
        int | None, typer.Option(help="N of one repeat. \\[default: 5000]", rich_help_panel=FINAL)
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(help="At least 3. \\[default: 4]", rich_help_panel=FINAL)
    ] = None,
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
    from merge_rl.cli.settings import build_config, split_named
    from merge_rl.storage.checkpoints import open_checkpoints

    own_reference, references = split_named("--reference", reference or [])
    own_weights, weights = split_named("--extractor-weights", extractor_weights or [])
    given: dict[str, Any] = {
        "track": track, "budget": budget, "seed": seed, "extractor": extractor, "batch": batch,
        "extractor_weights": own_weights, "reference": own_reference, "heldout": heldout,
        "extra_references": references, "extra_weights": weights,
        "autoencoder": autoencoder, "autoencoder_weights": autoencoder_weights,
        "device": device, "sampler.solver": solver, "sampler.num_steps": steps,
        "sampler.guidance": guidance, "sampler.guide": guide,
        "evaluation.num_images": final_images, "evaluation.repeats": repeats,
    }  # fmt: skip
    if fast:
        given |= {f"sampler.{key}": value for key, value in fast_settings().items()}
    defaults = open_checkpoints(checkpoints, track=track).defaults
    settings = build_config(
        checkpoints, config, given, overrides=setting or [], sampler=defaults.sampler
    )
    folder = out or Path("runs") / f"{checkpoints.resolve().name}-compare"
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
    from merge_rl.workflows.compare_report import write_comparison

    try:
        with ProgressTracker(quiet=json) as tracker:
            document = compare_searchers(
                settings, out=folder, searchers=searchers, seeds=seeds, curve_images=curve_images,
                tracker=tracker,
            )  # fmt: skip
    except KeyboardInterrupt:
        if folder.is_dir():
            say(
                f"\nstopped; what is done is kept in {escape(str(folder))}. Go on: the same command"
            )
            raise typer.Exit(1) from None
        raise
    note = write_comparison(document, folder)
    if note:
        say(f"no plot: {escape(note)}")
    return document


def print_comparison(document: Mapping[str, Any]) -> None:
    """The tables on stdout."""
    from merge_rl.workflows import compare_text as text

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
