"""`mergerl evaluate`: scores of a model, of images or of features."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from merge_rl.cli import options, ranks
from merge_rl.cli.output import (
    JsonFlag,
    ProgressTracker,
    interval_text,
    note_unused_gpu,
    number_text,
    print_json,
    print_table,
    say,
)
from merge_rl.cli.sample import find_autoencoder, find_sampler
from merge_rl.errors import ConfigError

if TYPE_CHECKING:
    from merge_rl.workflows.assembly import Surroundings


NUM_IMAGES: Final = 5000
HIGHER_IS_BETTER: Final = ("precision", "recall", "density", "coverage")


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(evaluate)


def evaluate(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="Model folder, one .safetensors of a set, images (folder, .zip, .npz), or saved "
            "features.",
        ),
    ],
    num_images: Annotated[
        int | None,
        typer.Option(
            "--num-images",
            help="N of one repeat; papers use 50000. \\[default: 5000; of images, all there are]",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Disjoint blocks of seeds, or of images.")] = 3,
    metrics: Annotated[
        str, typer.Option(help="Comma-separated: fid, kid, mmd, prdc, fid-infinity.")
    ] = "fid",
    seed: Annotated[int, typer.Option(help="First image seed.")] = 0,
    extractor: Annotated[
        str | None, typer.Option(help="Feature extractor, or package.module:factory.")
    ] = None,
    extractor_weights: Annotated[
        str | None, typer.Option(help="Its weights: file, folder, or public name.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Statistics of real data, of any known format.")
    ] = None,
    heldout: Annotated[Path | None, typer.Option(help="Statistics of held-out data.")] = None,
    under: Annotated[
        str | None, typer.Option(help="ode, sde or both. \\[default: both for SiT, ode for EDM2]")
    ] = None,
    solver: options.SamplingSolver = None,
    steps: options.SamplingSteps = None,
    guidance: options.SamplingGuidance = None,
    guide: options.SamplingGuide = None,
    diffusion: options.Diffusion = None,
    last_step: options.LastStep = None,
    low_memory: options.LowMemory = False,
    fast: options.SamplingFast = False,
    sampler_setting: options.Other = None,
    autoencoder: options.SamplingAutoencoder = None,
    autoencoder_weights: options.SamplingAutoencoderWeights = None,
    max_rows: Annotated[
        int, typer.Option(min=2, help="Rows of either set that kid, mmd and prdc compare.")
    ] = 10_000,
    save_features: Annotated[
        Path | None, typer.Option(help="Folder to keep features in, and to go on from.")
    ] = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out unreadable images, and count them.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Images in one forward pass.")] = 250,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Score a model: FID and others, several repeats, mean, 95 % interval and minimum.

    What is not said comes from the run or the checkpoint set that the model lies in.
    """
    from merge_rl.workflows.assembly import build_extractor, find_surroundings, load_model
    from merge_rl.workflows.evaluate import evaluate as score
    from merge_rl.workflows.evaluate import require_scorable, samplers_of
    from merge_rl.workflows.reference import kind_of

    near, kind = find_surroundings(model), kind_of(model)
    device = ranks.own_device(device)
    note_unused_gpu(device)
    target = str(reference or near.reference or "")
    if not target:
        raise ConfigError(f"no run or manifest near {model} names a reference; pass --reference")
    target_heldout = str(heldout) if heldout else None if reference else near.heldout
    wanted = [m.strip() for m in metrics.split(",")]
    given: dict[str, Any] = {"model": model}
    if kind != "features":
        name, weights = _extractor(model, target, near, extractor, extractor_weights)
        targets = {"reference": target, "heldout": target_heldout}
        require_scorable(name, weights, targets, wanted)  # before anything is fetched
    if kind == "model":
        settings = find_sampler(
            model, solver=solver, num_steps=steps, guidance=guidance, guide=guide,
            diffusion=diffusion, last_step=last_step, low_memory=low_memory or None, fast=fast,
            other=sampler_setting,
        )  # fmt: skip
        network = load_model(model)
        # A solver that is named is the one that is meant.
        which = under or (None if solver is None else "sde" if settings.is_sde else "ode")
        given = {
            "model": network,
            "sampler": samplers_of(network, settings, which),
            "autoencoder": find_autoencoder(model, network, autoencoder, autoencoder_weights),
        }
    if kind == "features":
        given["extractor"] = extractor
    else:
        given["extractor"], given["extractor_sha256"] = build_extractor(name, weights, device, say)
    with ProgressTracker(quiet=json) as tracker:
        document = score(
            given.pop("model"),
            **given,
            reference=target,
            heldout=target_heldout,
            metrics=wanted,
            num_images=NUM_IMAGES if num_images is None and kind == "model" else num_images,
            repeats=repeats,
            batch=batch,
            device=device,
            seed=seed,
            max_rows=max_rows,
            save_features=save_features,
            skip_broken=skip_broken,
            tracker=tracker,
        )
    if json:
        print_json({"model": str(model), **document})
    else:
        _show(document)


def _extractor(
    model: Path, target: str, near: Surroundings, name: str | None, weights: str | None
) -> tuple[str, str | None]:
    """Name and weights: as said, else as the run or set says, else as the reference does."""
    from merge_rl.workflows.assembly import is_user_module
    from merge_rl.workflows.reference import load_reference

    found = name or near.extractor or load_reference(target).extractor
    if not found:
        raise ConfigError(f"no run or manifest near {model} names an extractor; pass --extractor")
    if name is None and is_user_module(found):
        # The run may come from somebody else: its word alone does not make us run code.
        raise ConfigError(
            f"the run near {model} used the extractor {found!r}, a module of its own; "
            f"pass --extractor {found} to import it here"
        )
    own = found == near.extractor
    return found, weights or (near.extractor_weights if own else None)


def _show(document: Mapping[str, Any]) -> None:
    """A table for each sampler, N in its title."""
    count, repeats = document["num_images"], document["repeats"]
    title = f"N = {count:,}, {repeats} {'repeats' if repeats > 1 else 'block'}"
    if "first_seed" in document:
        first = document["first_seed"]
        title += f", seeds {first}-{first + count * repeats - 1}"
    sections = document.get("samplers") or {"": document}
    for section in sections.values():
        used = section.get("sampler")
        how = f", {used['solver']} with {used['num_steps']} steps" if used else ""
        rows = [
            [f"{metric}, {name}", interval_text(value), _best(metric, value)]
            for metric, of_references in section.items()
            if metric not in _NO_METRICS and isinstance(of_references, Mapping)
            for name, value in of_references.items()
        ]
        print_table(title + how, ["score", "mean [95 % interval]", "minimum"], rows)
    if repeats == 1:
        say("one block of images: no interval; a smaller --num-images gives several blocks")
    for note in document.get("notes", []):
        say(f"[yellow]note:[/] {note}")


_NO_METRICS: Final = ("sampler", "samplers")


def _best(metric: str, value: Mapping[str, Any]) -> str:
    return "-" if metric in HIGHER_IS_BETTER else number_text(value["min"], value["mean"])
