"""`mergerl finetune`, and the way back into one of its runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from merge_rl.cli.options import split_named
from merge_rl.cli.output import JsonFlag, ProgressTracker, note_unused_gpu, print_json, stoppable
from merge_rl.cli.results import FinetuneTracker, finetuned_document, print_finetuned
from merge_rl.config import override, set_dotted
from merge_rl.errors import ConfigError

if TYPE_CHECKING:
    from merge_rl.config import FinetuneConfig
    from merge_rl.workflows.finetune import FinetuneResult


LEARN, REWARD, SCORES, MODEL, RUN = (
    "Rollouts and updates", "Reward", "Scores", "Model and sampling", "The run",
)  # fmt: skip
WINDOW: Final = re.compile(r"(?:(\d+)\+)?(\d+)")


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(finetune)


def _option(panel: str, help_text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, **more)


def finetune(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="Model folder, one .safetensors of a set, or a set's folder (its newest).",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Run directory. \\[default: runs/NAME-finetune-seedN]")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings; other options override it.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any setting, such as update.clip=0.1."),
    ] = None,
    track_of: Annotated[
        str | None,
        typer.Option("--from-track", help="Series of a set whose newest checkpoint is meant."),
    ] = None,
    algorithm: Annotated[
        str | None,
        _option(LEARN, "pg: policy gradient; rs: rejection sampling. \\[default: pg]"),
    ] = None,
    credit: Annotated[
        str | None,
        _option(LEARN, "set: one reward a subset; per-image: one an image. \\[default: set]"),
    ] = None,
    steps: Annotated[int | None, _option(LEARN, "Updates. \\[default: 100]")] = None,
    train_steps: Annotated[
        int | None, _option(LEARN, "Solver intervals of rollouts. \\[default: 50]")
    ] = None,
    under: Annotated[
        str | None,
        _option(LEARN, "Rollouts of rs: ode or sde; those of pg are sde. \\[default: ode for rs]"),
    ] = None,
    subsets: Annotated[
        int | None, _option(LEARN, "Sets of images a step compares. \\[default: 16]")
    ] = None,
    window: Annotated[
        str | None,
        _option(
            LEARN,
            "Noise in N solver steps alone, an ODE elsewhere: N moves, S+N starts at S.",
            metavar="[S+]N",
        ),
    ] = None,
    top_fraction: Annotated[
        float | None, _option(LEARN, "Of all rollouts, kept for the update. \\[default: 0.25]")
    ] = None,
    epochs: Annotated[
        int | None, _option(LEARN, "Updates from one batch of rollouts. \\[default: 1]")
    ] = None,
    lr: Annotated[float | None, _option(LEARN, "Adam's. \\[default: 1e-5]")] = None,
    clip: Annotated[float | None, _option(LEARN, "Of ratios. \\[default: 0.2]")] = None,
    kl: Annotated[
        float | None, _option(LEARN, "Weight of the KL to the frozen start. \\[default: 0]")
    ] = None,
    ema: Annotated[
        float | None, _option(LEARN, "Decay of the average of weights; 0: none. \\[default: 0.9]")
    ] = None,
    micro_batch: Annotated[
        int | None, _option(LEARN, "Images with gradients at a time. \\[default: 64]")
    ] = None,
    lora_rank: Annotated[
        int | None, _option(LEARN, "Train adapters of this rank alone (extra lora).")
    ] = None,
    reward: Annotated[
        str | None, _option(REWARD, "As of mergerl optimize. \\[default: fid-subset]")
    ] = None,
    pool: Annotated[int | None, _option(REWARD, "Images in the pool. \\[default: 5000]")] = None,
    subset: Annotated[
        int | None, _option(REWARD, "Images of a set, which it replaces. \\[default: 50]")
    ] = None,
    refresh: Annotated[
        str | None,
        _option(REWARD, "All of the pool every so many steps, or rolling. \\[default: 10]"),
    ] = None,
    extractor: Annotated[str | None, _option(REWARD, "Feature extractor.")] = None,
    extractor_weights: Annotated[
        list[str] | None, _option(REWARD, "Its weights.", metavar="[NAME=]PATH")
    ] = None,
    reference: Annotated[
        list[str] | None,
        _option(REWARD, "Statistics of real data to train against.", metavar="[NAME=]PATH"),
    ] = None,
    heldout: Annotated[
        Path | None, _option(REWARD, "Statistics of real data kept for the scores.")
    ] = None,
    eval_steps: Annotated[
        int | None, _option(SCORES, "Solver intervals of the other curves. \\[default: 250]")
    ] = None,
    eval_every: Annotated[
        int | None, _option(SCORES, "Steps between scores. \\[default: 50]")
    ] = None,
    eval_images: Annotated[
        int | None, _option(SCORES, "N of a point of a curve. \\[default: 2000]")
    ] = None,
    final_images: Annotated[
        int | None, _option(SCORES, "N of one repeat at the end. \\[default: 5000]")
    ] = None,
    repeats: Annotated[int | None, _option(SCORES, "At the end. \\[default: 3]")] = None,
    stop_on: Annotated[
        str | None,
        _option(SCORES, "End on the best of: ode-train, ode-eval, sde-train, sde-eval."),
    ] = None,
    autoencoder: Annotated[
        str | None, _option(MODEL, "What makes images of latents: sd-vae-edm2, sd-vae-sit.")
    ] = None,
    autoencoder_weights: Annotated[str | None, _option(MODEL, "Its weights.")] = None,
    guidance: Annotated[float | None, _option(MODEL, "Strength; 1 is off.")] = None,
    guide: Annotated[Path | None, _option(MODEL, "The weaker network.")] = None,
    precision: Annotated[
        str | None, _option(MODEL, "float32, tf32 or bfloat16 (autocast). \\[default: float32]")
    ] = None,
    batch: Annotated[int | None, _option(MODEL, "Images without gradients at a time.")] = None,
    device: Annotated[str | None, _option(MODEL, "cpu, cuda, ...")] = None,
    parallel: Annotated[
        str | None,
        _option(
            MODEL,
            "Under torchrun: ddp, all weights in every process; fsdp, shards. \\[default: ddp]",
        ),
    ] = None,
    seed: Annotated[int | None, _option(RUN, "Fixes every draw. \\[default: 0]")] = None,
    save_every: Annotated[
        int | None, _option(RUN, "Steps between resume points. \\[default: 10]")
    ] = None,
    keep_last: Annotated[
        int | None, _option(RUN, "Resume points that are kept. \\[default: 2]")
    ] = None,
    snapshot_every: Annotated[
        int | None, _option(RUN, "Steps between snapshots of the weights. \\[default: 25]")
    ] = None,
    track: Annotated[
        list[str] | None,
        _option(RUN, "tensorboard, wandb or trackio (extras); events.jsonl is always there."),
    ] = None,
    licence: Annotated[str | None, _option(RUN, "Of the result.", "--license")] = None,
    resume: Annotated[
        bool, _option(RUN, "Go on with the run in --out; settings must be its own.", "--resume")
    ] = False,
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Fine-tune a network with the distribution-wise reward (the weights, not a merge).

    Rollouts under an SDE with few steps, rewards for sets of images by how they change the FID of
    a pool, and a clipped policy gradient over the denoising steps. Scored under ODE and SDE, with
    the steps of training and of evaluation: gains under one need not carry over. The run is a
    checkpoint set of its snapshots: [bold]mergerl optimize RUN[/bold] merges the trajectory.
    Ctrl-C and SIGTERM save; [bold]mergerl resume RUN[/bold] goes on.
    """
    from merge_rl.storage.checkpoints import newest_model

    own_reference, references = split_named("--reference", reference or [])
    own_weights, weights = split_named("--extractor-weights", extractor_weights or [])
    source: str | Path = model
    if model.exists() or track_of:
        source = newest_model(model, track_of)
    start, size = _window(window)
    given = {
        "algorithm": algorithm, "credit": credit, "steps": steps, "seed": seed, "batch": batch,
        "rollout.under": under, "rollout.train_steps": train_steps, "rollout.subsets": subsets,
        "rollout.window_size": size, "rollout.window_start": start,
        "update.top_fraction": top_fraction, "update.epochs": epochs, "update.learning_rate": lr,
        "update.clip": clip, "update.kl_weight": kl, "update.ema_decay": ema,
        "update.micro_batch": micro_batch, "lora.rank": lora_rank, "reward.name": reward,
        "reward.pool_size": pool, "reward.subset_size": subset, "reward.refresh": refresh,
        "extractor": extractor, "extractor_weights": own_weights, "reference": own_reference,
        "extra_references": references, "extra_weights": weights, "heldout": heldout,
        "autoencoder": autoencoder, "autoencoder_weights": autoencoder_weights,
        "curves.eval_steps": eval_steps, "curves.every": eval_every,
        "curves.num_images": eval_images, "curves.final_images": final_images,
        "curves.repeats": repeats, "curves.stop_on": stop_on, "sampler.guidance": guidance,
        "sampler.guide": guide, "sampler.precision": precision, "device": device,
        "parallel": parallel,
        "save_every": save_every, "keep_last": keep_last, "snapshot_every": snapshot_every,
        "track": track, "licence": licence,
    }  # fmt: skip
    settings = build_settings(source, config, given, setting or [])
    run_dir = out or Path("runs") / f"{_name(Path(source))}-finetune-seed{settings.seed}"
    note_unused_gpu(settings.device)
    _drive_new(source, run_dir, settings, resume=resume, json=json)


def build_settings(
    model: str | Path, file: Path | None, given: Mapping[str, Any], overrides: Sequence[str]
) -> FinetuneConfig:
    """Defaults, then the YAML file, then options, then KEY=VALUE overrides.

    Settings of a sampler that are not said are those of the model's set or run.
    """
    from merge_rl.config import PAPER_REWARD, FinetuneConfig, from_mapping, load_mapping, to_mapping
    from merge_rl.workflows.assembly import find_surroundings

    values: dict[str, Any] = load_mapping(file) if file else {}
    values["model"] = str(model)
    for key, value in given.items():
        if value is not None:
            if isinstance(value, dict) and isinstance(values.get(key), Mapping):
                value = {**values[key], **value}
            set_dotted(values, key, str(value) if isinstance(value, Path) else value)
    for pair in overrides:
        override(values, pair)
    if isinstance(values.get("reward"), Mapping):
        values["reward"] = {**to_mapping(PAPER_REWARD), **values["reward"]}
    if isinstance(values.get("sampler"), Mapping):
        near = find_surroundings(model).sampler
        values["sampler"] = {**(to_mapping(near) if near else {}), **values["sampler"]}
    return from_mapping(FinetuneConfig, values)


def resume_run(run: Path, *, json: bool) -> None:
    """Go on with an interrupted run, for `mergerl resume`."""
    from merge_rl.workflows.finetune import resume_finetune

    _drive(run, lambda tracker: resume_finetune(run, tracker=tracker), json=json)


def _drive_new(
    source: str | Path, run: Path, settings: FinetuneConfig, *, resume: bool, json: bool
) -> None:
    from merge_rl.workflows.finetune import finetune as run_finetune

    def job(tracker: ProgressTracker) -> FinetuneResult:
        return run_finetune(str(source), out=run, config=settings, resume=resume, tracker=tracker)

    _drive(run, job, json=json)


def _drive(run: Path, job: Callable[[ProgressTracker], FinetuneResult], *, json: bool) -> None:
    from merge_rl.storage.runs import is_finetune_run

    done = f"finished steps are saved. Go on with: mergerl resume {run}"
    with stoppable(partial(is_finetune_run, run), done), FinetuneTracker(quiet=json) as tracker:
        result = job(tracker)
    if json:
        print_json(finetuned_document(result))
    else:
        print_finetuned(result)


def _window(text: str | None) -> tuple[int | None, int | None]:
    """(start, size) of "[S+]N"."""
    if text is None:
        return None, None
    found = WINDOW.fullmatch(text)
    if found is None:
        raise ConfigError(f"expected --window N or S+N, got {text!r}")
    return (None if found[1] is None else int(found[1])), int(found[2])


def _name(path: Path) -> str:
    return path.resolve().stem or "model"
