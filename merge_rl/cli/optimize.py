"""`mergerl demo`, `optimize`, `plan`, `resume`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from merge_rl.cli import ranks
from merge_rl.cli.finetune import resume_run
from merge_rl.cli.options import build_for_set, decimal, integer, meant_set, named, with_settings
from merge_rl.cli.output import (
    JsonFlag,
    ProgressTracker,
    note,
    note_unused_gpu,
    print_json,
    stoppable,
    tell,
)
from merge_rl.cli.plan import show_plan
from merge_rl.cli.results import print_result, result_document
from merge_rl.config import OptimizeConfig
from merge_rl.errors import quoted
from merge_rl.own_code import allow

if TYPE_CHECKING:
    from collections.abc import Callable

    from merge_rl.storage.checkpoints import CheckpointSet
    from merge_rl.workflows.optimize import OptimizeResult

COST: Final = "Cost, before it starts (mergerl plan)"
Checkpoints = Annotated[
    Path,
    typer.Argument(
        metavar="CKPTS", help="Folder of .safetensors, with or without manifest, or user/repo."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(demo)
    app.command()(optimize)
    app.command()(resume)


def register_plan(app: typer.Typer) -> None:
    """Add `plan`, which stands after other commands in the list."""
    app.command()(plan)


def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it.")],
    pixels: Annotated[
        int,
        typer.Option(help="Side of a digit: 8, or 28 for a larger EDM2 alone.", parser=integer),
    ] = 8,
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Write the embedded digits runs: an EDM2 and a SiT with reference statistics."""
    from merge_rl.demo import write_demo
    from merge_rl.storage.checkpoints import open_checkpoints

    written = write_demo(folder, pixels)
    if json:
        print_json({name: str(path) for name, path in written.items()})
        return
    for name, path in written.items():
        opened = open_checkpoints(path)
        tracks = ", ".join(opened.tracks)
        tell(f"wrote {path}: {len(opened)} checkpoints of {name} (tracks {tracks})")
    recipe = " --config digits28" if pixels == 28 else ""
    for path in written.values():
        tell(f"next: mergerl optimize {quoted(path)}{recipe}")


Out = Annotated[
    Path | None,
    typer.Option(help="Run directory; must not exist.", show_default="runs/NAME-seedN"),
]
Devices = Annotated[
    str, typer.Option(help="Numbers of devices to tell the cost for.", rich_help_panel=COST)
]
Memory = Annotated[
    float | None,
    typer.Option(
        help="GiB that a device has.",
        show_default="what is free on this one",
        rich_help_panel=COST,
        parser=decimal,
    ),
]
OWN: Final = typer.Option(
    metavar="NAME", help="package.module:factory that the run names.",
    show_default="none is imported", rich_help_panel="Code of your own that the run uses",
)  # fmt: skip
# A search scores a deterministic ODE.
NO_SDE: Final = ("sampler.diffusion", "sampler.last_step")


@with_settings(OptimizeConfig, without=NO_SDE, presets=True)
def optimize(
    checkpoints: Checkpoints,
    *,
    out: Out = None,
    settings: Mapping[str, Any],
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what it will cost and stop.", rich_help_panel=COST),
    ] = False,
    devices: Devices = "1,8,64",
    memory: Memory = None,
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Search the merging coefficients of a checkpoint set: the main job.

    Each round proposes coefficients, merges, generates images with a deterministic ODE and scores
    how the FID of a pool of images changes when some of it is replaced. Ends with a comparison on
    fresh seeds and writes RUN/merged. Ctrl-C keeps the finished rounds; go on with
    [bold]mergerl resume RUN[/bold].

    [bold]mergerl optimize digits/edm2 --out runs/a --budget 20000[/bold]
    """
    config, opened, run_dir = search_settings(checkpoints, settings, out)
    if dry_run:
        show_plan(config, opened, run_dir, devices=devices, memory=memory, json=json)
        return
    from merge_rl.workflows.optimize import optimize_set

    note_unused_gpu(config.device)
    _drive(
        run_dir,
        lambda tracker: optimize_set(config, opened, run_dir, tracker),
        json=json,
    )


@with_settings(OptimizeConfig, without=NO_SDE, presets=True)
def plan(
    checkpoints: Checkpoints,
    *,
    out: Out = None,
    settings: Mapping[str, Any],
    devices: Devices = "1,8,64",
    memory: Memory = None,
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """What a search will cost; takes the options of optimize, runs nothing.

    Images, network calls, FLOPs, bytes moved, memory of a device, disk, and the time on several
    numbers of devices, from a calibration of this machine that takes some seconds. Refuses what
    cannot fit, and says the largest batch that does.

    [bold]mergerl plan digits/edm2 --budget 20000[/bold]
    """
    config, opened, run_dir = search_settings(checkpoints, settings, out)
    show_plan(config, opened, run_dir, devices=devices, memory=memory, json=json)


def search_settings(
    checkpoints: Path, settings: Mapping[str, Any], out: Path | None
) -> tuple[OptimizeConfig, CheckpointSet, Path]:
    """The settings of a search over the set's own sampler, the set, and the run directory."""
    checkpoints = meant_set(checkpoints)
    config, opened = build_for_set(settings, checkpoints)
    return config, opened, out or Path("runs") / f"{checkpoints.resolve().name}-seed{config.seed}"


def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    checkpoints: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Where its set (or the model that it fine-tunes) was moved; hashes are checked.",
            show_default="where it was",
        ),
    ] = None,
    network: Annotated[str | None, OWN] = None,
    autoencoder: Annotated[str | None, OWN] = None,
    extractor: Annotated[str | None, OWN] = None,
    searcher: Annotated[str | None, OWN] = None,
    reward: Annotated[str | None, OWN] = None,
    guide_network: Annotated[str | None, OWN] = None,
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Go on with an interrupted run; it ends as if it had never been interrupted.

    Code of your own that it uses is imported where you name it here again.
    """
    from merge_rl.storage.runs import find_run, is_finetune_run
    from merge_rl.workflows.optimize import resume as run_resume

    for code in filter(None, (network, autoencoder, extractor, searcher, reward, guide_network)):
        allow(code)
    run, moved = find_run(run).told(note), checkpoints and named(checkpoints)
    if is_finetune_run(run):
        ranks.require_parallel("finetune")
        resume_run(run, moved, json=json)
    else:
        _drive(
            run,
            lambda tracker: run_resume(run, checkpoints=moved, tracker=tracker),
            json=json,
        )


def _drive(run_dir: Path, job: Callable[[ProgressTracker], OptimizeResult], *, json: bool) -> None:
    done = f"finished rounds are saved. Go on with: mergerl resume {quoted(run_dir)}"
    begun = (run_dir / "config.yaml").is_file
    with stoppable(begun, done), ProgressTracker() as tracker:
        result = job(tracker)
    if json:
        print_json(result_document(result))
    else:
        print_result(result)
