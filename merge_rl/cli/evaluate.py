"""`mergerl evaluate` and `mergerl reference`: scores, and the statistics that they compare with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from merge_rl.cli import ranks
from merge_rl.cli.options import MODEL_HELP, build, meant, named, with_settings
from merge_rl.cli.output import (
    JsonFlag,
    ProgressTracker,
    note_all,
    note_unused_gpu,
    print_json,
    say,
)
from merge_rl.cli.results import interval_text, number_text
from merge_rl.cli.sample import find_autoencoder, generation_settings, require_named
from merge_rl.cli.tables import print_table
from merge_rl.config import EvaluateConfig, ReferenceConfig, SamplerConfig
from merge_rl.errors import ConfigError, absent
from merge_rl.own_code import is_own

if TYPE_CHECKING:
    from merge_rl.workflows.assembly import ModelDefaults


HIGHER_IS_BETTER: Final = ("precision", "recall", "density", "coverage")


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(evaluate)
    app.command()(reference)


@with_settings(EvaluateConfig)
def evaluate(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help=f"{MODEL_HELP[:-1]}; or images (folder, .zip, .npz), or saved features.",
        ),
    ],
    settings: Mapping[str, Any],
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Score a model: FID and others, the mean of repeats with its 95 % interval.

    What is not said comes from the run or the checkpoint set that the model lies in. The minimum
    of the repeats is printed too: papers on EDM2 report that of three.

    [bold]mergerl evaluate runs/a --num-images 2000 --metrics fid,fid-infinity[/bold]
    """
    from merge_rl.storage.hub import is_set_of_hub
    from merge_rl.workflows.assembly import build_extractor, find_defaults
    from merge_rl.workflows.evaluate import evaluate as score
    from merge_rl.workflows.reference import kind_to_score

    kind = kind_to_score(model)
    # One model of the Hub is fetched when all else is known; of a set, its manifest has to be.
    here = isinstance(named(model), Path) or model.is_absolute()
    if kind == "model" and (here or is_set_of_hub(named(model))):
        model = meant(model)
    near = find_defaults(model)
    config, sampler = generation_settings(EvaluateConfig, settings, model)
    config = replace(config, device=ranks.own_device(config.device), sampler=sampler)
    note_unused_gpu(config.device)
    if kind == "model" and here:
        require_named(model, config, "extractor", "extractor_weights", "reference", "heldout")
    target = config.reference or near.reference or ""
    if not target:
        raise ConfigError(f"no run or manifest near {model} names a reference; pass --reference")
    heldout = config.heldout or (None if config.reference else near.heldout)
    config = replace(config, reference=target, heldout=heldout)
    what: dict[str, Any] = {"model": model, "extractor": config.extractor}
    if kind != "features":
        name, weights = _extractor(model, config, near)
        if kind == "model":
            what |= _generated(model, config, settings)
        built, digest = build_extractor(name, weights, config.device, say)
        what |= {"extractor": built, "extractor_sha256": digest}
    with ProgressTracker(quiet=json) as tracker:
        document = score(
            **what, reference=target, heldout=heldout, metrics=_metrics(config),
            num_images=config.num_images, repeats=config.repeats, batch=config.batch,
            device=config.device, seed=config.seed, max_rows=config.max_rows,
            save_features=config.save_features, skip_broken=config.skip_broken, tracker=tracker,
        )  # fmt: skip
    if json:
        print_json({"model": str(model), **document})
    else:
        _show_scores(document)


def _metrics(config: EvaluateConfig) -> list[str]:
    return list(config.metric_names)


def _generated(model: Path, config: EvaluateConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The network, and how its images are made."""
    from merge_rl.workflows.assembly import load_network
    from merge_rl.workflows.evaluate import samplers_of

    place, sampler = meant(model), config.sampler or SamplerConfig()
    network = load_network(place, config.network)
    if place != model:  # the recipe of a merge from the Hub has come with it
        _, sampler = generation_settings(EvaluateConfig, settings, place)
    # A solver that is named is the one that is meant.
    named = "solver" in settings.get("sampler", {})
    which = config.under or (None if not named else "sde" if sampler.is_sde else "ode")
    return {
        "model": network,
        "sampler": samplers_of(network, sampler, which),
        "autoencoder": find_autoencoder(place, network, config),
    }


def _extractor(model: Path, config: EvaluateConfig, near: ModelDefaults) -> tuple[str, str | None]:
    """Name and weights: as said, else as the run or set says, else as the reference does.

    Refuses what cannot be scored with it, before anything is fetched.
    """
    from merge_rl.workflows.evaluate import require_scorable
    from merge_rl.workflows.reference import load_reference

    found = config.extractor or near.extractor
    found = found or load_reference(str(config.reference)).extractor
    if not found:
        raise ConfigError(f"no run or manifest near {model} names an extractor; pass --extractor")
    if config.extractor is None and is_own(found):
        # The run may come from somebody else: its word alone does not make us run code.
        raise ConfigError(
            f"the run near {model} used the extractor {found!r}, a module of its own; "
            f"pass --extractor {found} to import it here"
        )
    own = found == near.extractor
    weights = config.extractor_weights or (near.extractor_weights if own else None)
    targets = {"reference": config.reference, "heldout": config.heldout}
    require_scorable(found, weights, targets, _metrics(config))
    return found, weights


def _show_scores(document: Mapping[str, Any]) -> None:
    """A table for each sampler, N in its title."""
    count, repeats = document["num_images"], document["repeats"]
    title = f"N = {count:,}, {repeats} {'repeats' if repeats > 1 else 'block'}"
    if "seed" in document:
        title += f", seed {document['seed']}"
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
    note_all(document.get("notes", []))


_NO_METRICS: Final = ("sampler", "samplers")


def _best(metric: str, value: Mapping[str, Any]) -> str:
    return "-" if metric in HIGHER_IS_BETTER else number_text(value["min"], value["mean"])


@with_settings(ReferenceConfig)
def reference(
    images: Annotated[
        Path, typer.Argument(metavar="IMAGES", help="Folder, .zip or .npz of images.")
    ],
    settings: Mapping[str, Any],
    out: Annotated[Path, typer.Option(help="The .safetensors to write.")],
    extractor: Annotated[str, typer.Option(help="Feature extractor, or package.module:factory.")],
    extractor_weights: Annotated[
        str | None, typer.Option(help="The extractor's weights: file, folder, or public name.")
    ] = None,
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Reference statistics of real images, to optimise against and to report.

    Images stream through the extractor, so their number does not matter. Interrupted, the same
    command goes on where it was. Labels come from a dataset.json beside the images.

    [bold]mergerl reference photos/ --out ref.safetensors --extractor inception --split[/bold]
    """
    from merge_rl.workflows.assembly import build_extractor
    from merge_rl.workflows.reference import build_reference

    config = build(ReferenceConfig, settings)
    if not images.exists():
        raise ConfigError(absent(images))
    device = ranks.own_device(config.device)
    note_unused_gpu(device)
    built, digest = build_extractor(extractor, extractor_weights, device, say)
    with ProgressTracker(quiet=json) as tracker:
        document = build_reference(
            images, out, extractor=built, extractor_sha256=digest,
            config=replace(config, device=device), tracker=tracker,
        )  # fmt: skip
    if json:
        print_json(document)
    else:
        _show_statistics(document)


def _show_statistics(document: Mapping[str, Any]) -> None:
    """A line for each file of statistics."""
    size = document["resolution"]
    rows = [
        [file["out"], f"{file['images']:,}", f"{file['features_kept']:,}"]
        for file in document["files"]
    ]
    title = f"{document['dim']} features of {document['extractor']}"
    title += f", {size} x {size}" if size else ""
    print_table(title, ["statistics", "images", "features kept"], rows)
