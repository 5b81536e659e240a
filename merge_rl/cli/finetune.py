"""`mergerl finetune`, and the way back into one of its runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from merge_rl.cli.options import MODEL_HELP, build, meant, named, split_tracks, with_settings
from merge_rl.cli.output import JsonFlag, ProgressTracker, note_unused_gpu, print_json, stoppable
from merge_rl.cli.results import (
    FinetuneTracker,
    finetuned_document,
    print_finetuned,
)
from merge_rl.config import PAPER_REWARD, FinetuneConfig, to_mapping
from merge_rl.errors import quoted

if TYPE_CHECKING:
    from merge_rl.workflows.finetune import FinetuneResult


# Training and scores have solvers and numbers of steps of their own.
WITHOUT: Final = tuple(
    f"sampler.{name}"
    for name in ("solver", "num_steps", "diffusion", "last_step", "low_memory", "compile")
)


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(finetune)


@with_settings(FinetuneConfig, without=WITHOUT)
def finetune(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help=MODEL_HELP),
    ],
    *,
    out: Annotated[
        Path | None,
        typer.Option(help="Run directory.", show_default="runs/NAME-finetune-seedN"),
    ] = None,
    settings: Mapping[str, Any],
    track: Annotated[
        list[str] | None,
        typer.Option(metavar="<str>", help="Series of a set whose newest checkpoint is meant."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --out; settings must be its own."),
    ] = False,
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Fine-tune a network, its weights instead of a merge, with the same reward.

    Rollouts under an SDE with few steps, rewards for sets of images by how they change the FID of
    a pool, and a clipped policy gradient over the denoising steps. Scored under ODE and SDE, with
    the steps of training and of evaluation: gains under one need not carry over. The run is a
    checkpoint set of its snapshots: [bold]mergerl optimize RUN[/bold] merges the trajectory.
    Ctrl-C and SIGTERM save; [bold]mergerl resume RUN[/bold] goes on.

    [bold]mergerl finetune digits/sit --config finetune-digits-sit --out runs/ft[/bold]
    """
    from merge_rl.storage.hub import is_set_of_hub

    series, trackers = split_tracks(track or [])
    if trackers:
        settings = {**settings, "track": [*settings.get("track", ()), *trackers]}
    # One model of the Hub is fetched when all else is known; a sampler's rest is the set's.
    near = model.exists() or ("sampler" in settings and is_set_of_hub(named(model)))
    source: str | Path = meant(model, series) if near or series else named(model)
    config = build_settings(source, settings)
    run_dir = out or Path("runs") / f"{_name(Path(source))}-finetune-seed{config.seed}"
    note_unused_gpu(config.device)
    _drive_new(source, run_dir, config, resume=resume, json=json)


def build_settings(model: str | Path, said: Mapping[str, Any]) -> FinetuneConfig:
    """The settings of a run; what is not said of a sampler is that of the model's set or run."""
    from merge_rl.workflows.assembly import find_defaults

    values = dict(said)
    if isinstance(values.get("reward"), Mapping):
        values["reward"] = {**to_mapping(PAPER_REWARD), **values["reward"]}
    near = find_defaults(model).sampler if "sampler" in values else None
    return build(FinetuneConfig, values, near=to_mapping(near) if near else None, model=str(model))


def resume_run(run: Path, checkpoints: Path | str | None, *, json: bool) -> None:
    """Go on with an interrupted run, for `mergerl resume`."""
    from merge_rl.workflows.finetune import resume_finetune

    _drive(
        run,
        lambda tracker: resume_finetune(run, checkpoints=checkpoints, tracker=tracker),
        json=json,
    )


def _drive_new(
    source: str | Path, run: Path, settings: FinetuneConfig, *, resume: bool, json: bool
) -> None:
    from merge_rl.workflows.finetune import finetune as run_finetune

    def job(tracker: ProgressTracker) -> FinetuneResult:
        return run_finetune(str(source), out=run, config=settings, resume=resume, tracker=tracker)

    _drive(run, job, json=json)


def _drive(run: Path, job: Callable[[ProgressTracker], FinetuneResult], *, json: bool) -> None:
    from merge_rl.storage.runs import is_finetune_run

    done = f"finished steps are saved. Go on with: mergerl resume {quoted(run)}"
    begun = partial(is_finetune_run, run)
    with stoppable(begun, done), FinetuneTracker(quiet=json) as tracker:
        result = job(tracker)
    if json:
        print_json(finetuned_document(result))
    else:
        print_finetuned(result)


def _name(path: Path) -> str:
    return path.resolve().stem or "model"
