"""`mergerl demo`, `optimize`, `resume`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from merge_rl.cli import options, ranks
from merge_rl.cli.finetune import resume_run
from merge_rl.cli.options import COST, FINAL, MODEL, REWARD, SEARCH, SEARCHER_HELP
from merge_rl.cli.output import JsonFlag, ProgressTracker, note_unused_gpu, print_json, stoppable
from merge_rl.cli.results import print_result, result_document

if TYPE_CHECKING:
    from collections.abc import Callable

    from merge_rl.workflows.optimize import OptimizeResult


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(demo)
    app.command()(optimize)
    app.command()(resume)


def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it.")],
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Write the embedded digits runs: an EDM2 and a SiT with extractor and reference statistics."""
    from merge_rl.demo import write_demo
    from merge_rl.storage.checkpoints import open_checkpoints

    written = write_demo(folder)
    if json:
        print_json({name: str(path) for name, path in written.items()})
        return
    for name, path in written.items():
        opened = open_checkpoints(path)
        tracks = ", ".join(opened.tracks)
        typer.echo(f"wrote {path}: {len(opened)} checkpoints of {name} (tracks {tracks})")
    small = "--track raw --budget 20000 --pool 1000 --final-images 1000"
    for path in written.values():
        typer.echo(f"next: mergerl optimize {path} {small}")


def optimize(
    checkpoints: options.Checkpoints,
    out: Annotated[
        Path | None,
        typer.Option(help="Run directory; must not exist. \\[default: runs/NAME-seedN]"),
    ] = None,
    config: options.Config = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Settings by name, under all others: paper (arXiv:2607.02291)."),
    ] = None,
    setting: options.Setting = None,
    track: options.Track = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A checkpoint to use, and no other; repeatable."),
    ] = None,
    budget: options.Budget = None,
    seed: Annotated[
        int | None, typer.Option(help="Fixes every draw. \\[default: 0]", rich_help_panel=SEARCH)
    ] = None,
    searcher: Annotated[
        str | None, typer.Option(help=SEARCHER_HELP, rich_help_panel=SEARCH)
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="direct, or mlp (EMANet). \\[default: direct]", rich_help_panel=SEARCH),
    ] = None,
    population: Annotated[
        int | None,
        typer.Option(
            help="Candidates a round. \\[default: the searcher's]", rich_help_panel=SEARCH
        ),
    ] = None,
    map_kind: Annotated[
        str | None,
        typer.Option(
            "--map",
            help="whitened (steps that change the weights alike), affine, free, softmax, ema. "
            "\\[default: whitened]",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="auto (the best of the merges that cost no search), newest, uniform, or a "
            "checkpoint's name. \\[default: auto]",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            help="Exploration: a share of the weights' norm for whitened, coefficient units for "
            "the other maps. \\[default: 0.02, 0.05]",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    max_abs: Annotated[
        float | None,
        typer.Option(help="No coefficient goes beyond it.", rich_help_panel=SEARCH),
    ] = None,
    l2: Annotated[
        float | None,
        typer.Option(
            help="FID that a sum of squared coefficients of 1 costs a candidate. \\[default: 0]",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    grouping: Annotated[
        str | None,
        typer.Option(
            help="What has coefficients of its own: stages of the network, its blocks; or one set "
            "for all tensors (one). \\[default: stages]",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=REGEX",
            help="Own coefficients for tensors whose names match; repeatable.",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help="fid-, kid- or mmd- with subset or full, fid-influence (first order, faster), on "
            "another extractor as fd-NAME-subset, or a sum: 'fid-subset + 0.2 * fd-dinov2-subset'. "
            "\\[default: fid-subset, or fid-full for searchers that remember rewards]",
            rich_help_panel=REWARD,
        ),
    ] = None,
    pool: Annotated[
        int | None, typer.Option(help="Images in the pool.", rich_help_panel=REWARD)
    ] = None,
    subset: Annotated[
        int | None, typer.Option(help="Images a candidate replaces.", rich_help_panel=REWARD)
    ] = None,
    refresh: Annotated[
        str | None,
        typer.Option(
            help="rolling, or all of the pool every so many rounds.", rich_help_panel=REWARD
        ),
    ] = None,
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
        str | None,
        typer.Option(
            help="Images in one forward pass, or auto: as many as the device has room for. "
            "\\[default: 250]",
            rich_help_panel=MODEL,
        ),
    ] = None,
    device: options.Device = None,
    weights_device: Annotated[
        str | None,
        typer.Option(
            help="Where the checkpoints lie: the device, cpu (memory) or disk (mapped files). "
            "\\[default: the first with room]",
            rich_help_panel=MODEL,
        ),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            "--license", help="Of the merge. \\[default: the checkpoints']", rich_help_panel=FINAL
        ),
    ] = None,
    final_images: options.FinalImages = None,
    repeats: options.Repeats = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what it will cost and stop.", rich_help_panel=COST),
    ] = False,
    devices: Annotated[
        str,
        typer.Option(help="Numbers of devices to tell the cost for.", rich_help_panel=COST),
    ] = "1,8,64",
    memory: Annotated[
        float | None,
        typer.Option(
            help="GiB that a device has. \\[default: what is free on this one]",
            rich_help_panel=COST,
        ),
    ] = None,
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Search the merging coefficients of a checkpoint set: the main job.

    Each round proposes coefficients, merges, generates images with a deterministic ODE and scores
    how the FID of a pool of images changes when some of it is replaced. Ends with a comparison on
    fresh seeds and writes RUN/merged. Ctrl-C keeps the finished rounds; go on with
    [bold]mergerl resume RUN[/bold].
    """
    from merge_rl.cli.options import build_config
    from merge_rl.config import preset as settings_of
    from merge_rl.storage.checkpoints import open_checkpoints
    from merge_rl.workflows.optimize import optimize as run_optimize

    given = options.shared_settings(
        track=track, budget=budget, seed=seed, select=only or None, extractor=extractor,
        extractor_weights=extractor_weights, reference=reference, heldout=heldout,
        autoencoder=autoencoder, autoencoder_weights=autoencoder_weights, solver=solver,
        steps=steps, guidance=guidance, guide=guide, fast=fast, batch=batch, device=device,
        weights_device=weights_device, licence=licence, final_images=final_images,
        repeats=repeats,
    ) | {
        "search.name": searcher, "search.policy": policy, "search.population": population,
        "merge.map": map_kind, "merge.grouping": grouping, "merge.start": start,
        "merge.scale": scale,
        "merge.max_abs": max_abs, "merge.l2": l2, "reward.name": reward,
        "reward.pool_size": pool, "reward.subset_size": subset, "reward.refresh": refresh,
    }  # fmt: skip
    defaults = open_checkpoints(checkpoints, track=track, select=only or None).defaults
    settings = build_config(
        checkpoints, config, given, groups=group or [], overrides=setting or [],
        sampler=defaults.sampler, base=settings_of(preset) if preset else None,
    )  # fmt: skip
    run_dir = out or Path("runs") / f"{checkpoints.resolve().name}-seed{settings.seed}"
    if dry_run:
        from merge_rl.cli.plan import show_plan

        show_plan(settings, run_dir, devices=devices, memory=memory, json=json)
        return
    note_unused_gpu(settings.device)
    _drive(
        run_dir,
        lambda tracker: run_optimize(checkpoints, out=run_dir, config=settings, tracker=tracker),
        json=json,
    )


def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Go on with an interrupted run; it ends as if it had never been interrupted."""
    from merge_rl.storage.runs import is_finetune_run
    from merge_rl.workflows.optimize import resume as run_resume

    if is_finetune_run(run):
        ranks.require_parallel("finetune")
        resume_run(run, json=json)
    else:
        _drive(run, lambda tracker: run_resume(run, tracker=tracker), json=json)


def _drive(run_dir: Path, job: Callable[[ProgressTracker], OptimizeResult], *, json: bool) -> None:
    done = f"finished rounds are saved. Go on with: mergerl resume {run_dir}"
    with stoppable((run_dir / "config.yaml").is_file, done), ProgressTracker() as tracker:
        result = job(tracker)
    if json:
        print_json(result_document(result))
    else:
        print_result(result)


HELP: Final = """What a search with these options will cost; takes those of optimize, runs nothing.

Images, network calls, FLOPs, bytes moved, memory of a device, disk, and the time on several numbers
of devices, from a calibration of this machine that takes some seconds. Refuses what cannot fit, and
says the largest batch that does.
"""


def register_plan(app: typer.Typer) -> None:
    """Add the command, with all options of `optimize`: what it costs is what it is asked for."""
    signature = inspect.signature(optimize, eval_str=True)
    options = [p for name, p in signature.parameters.items() if name != "dry_run"]

    def plan(**given: Any) -> None:
        optimize(**given, dry_run=True)

    plan.__doc__ = HELP
    plan.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    plan.__annotations__ = {option.name: option.annotation for option in options}
    app.command()(plan)
