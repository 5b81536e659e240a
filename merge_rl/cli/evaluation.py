"""`mergerl sample` and `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merge_rl.cli.output import (
    JsonFlag,
    ProgressTracker,
    interval_text,
    print_json,
    print_table,
)
from merge_rl.errors import ConfigError

if TYPE_CHECKING:
    from merge_rl.config import SamplerConfig


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(sample)
    app.command()(evaluate)


MODEL_HELP = "Model folder, or one .safetensors of a set."


def sample(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("samples.png"),
    num: Annotated[int, typer.Option(help="Images.")] = 64,
    seed: Annotated[int, typer.Option(help="First image seed; one seed an image.")] = 0,
    label: Annotated[
        int | None, typer.Option("--class", help="One class for all. [default: each in turn]")
    ] = None,
    columns: Annotated[
        int | None, typer.Option(min=1, help="Of the grid. [default: square]")
    ] = None,
    zoom: Annotated[
        int | None, typer.Option(min=1, help="Enlarge pixels. [default: small images]")
    ] = None,
    solver: Annotated[str | None, typer.Option(help="heun or euler.")] = None,
    steps: Annotated[int | None, typer.Option(help="Solver intervals.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in one forward pass.")] = 250,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Generate a grid of images. The same seed is the same image, whatever the batch."""
    import torch

    from merge_rl.storage.images import enlarge, image_grid, write_png
    from merge_rl.workflows.evaluate import network_rollout
    from merge_rl.workflows.models import load_model
    from merge_rl.workflows.rollout import balanced_labels

    if num < 1:
        raise ConfigError(f"expected at least 1 image, got {num}")
    network = load_model(model)
    classes = int(getattr(network, "label_dim", 0))
    if label is not None and not 0 <= label < classes:
        known = f"in 0..{classes - 1}" if classes else "left out, the network has no classes"
        raise ConfigError(f"expected --class {known}, got {label}")
    labels = balanced_labels(num, classes) if label is None else torch.full((num,), label)
    sampler = _sampler(model, solver, steps)
    with ProgressTracker(quiet=json) as tracker:
        rollout = network_rollout(network, sampler, batch, device, on_images=tracker.advance)
        tracker.phase("sample", num)
        images = rollout.images(rollout.noise(range(seed, seed + num)), labels)
    grid = image_grid(images, columns or (10 if classes == 10 and num % 10 == 0 else None))
    factor = zoom or max(1, 480 // grid.shape[-1])
    write_png(out, enlarge(grid, factor))
    document = {"out": str(out), "images": num, "first_seed": seed, "labels": labels.tolist()}
    if json:
        print_json(document)
    else:
        typer.echo(f"wrote {num} images, seeds {seed}-{seed + num - 1}, to {out}")


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    num_images: Annotated[int, typer.Option("--num-images", help="N of one repeat.")] = 5000,
    repeats: Annotated[int, typer.Option(help="Disjoint blocks of seeds.")] = 3,
    metrics: Annotated[str, typer.Option(help="Comma-separated; fid.")] = "fid",
    seed: Annotated[int, typer.Option(help="First image seed.")] = 0,
    extractor: Annotated[str | None, typer.Option(help="Feature extractor.")] = None,
    extractor_weights: Annotated[Path | None, typer.Option(help="Its weights.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Statistics of real data.")] = None,
    heldout: Annotated[Path | None, typer.Option(help="Statistics of held-out data.")] = None,
    solver: Annotated[str | None, typer.Option(help="heun or euler.")] = None,
    steps: Annotated[int | None, typer.Option(help="Solver intervals.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in one forward pass.")] = 250,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Score a model: FID to reference statistics, several repeats, mean and 95 % interval.

    What is not said comes from the run or the checkpoint set that the model lies in.
    """
    from merge_rl.storage.reference import load_reference
    from merge_rl.workflows.assemble import build_extractor
    from merge_rl.workflows.defaults import find_surroundings
    from merge_rl.workflows.evaluate import evaluate as score
    from merge_rl.workflows.models import load_model

    near = find_surroundings(model)
    name, target = extractor or near.extractor, str(reference or near.reference or "")
    if name is None or not target:
        what, flag = (
            ("an extractor", "--extractor") if name is None else ("a reference", "--reference")
        )
        raise ConfigError(f"no run or manifest near {model} names {what}; pass {flag}")
    weights = str(extractor_weights or near.extractor_weights or "") or None
    built, digest = build_extractor(name, weights)
    held = str(heldout) if heldout else None if reference else near.heldout
    loaded = {}
    for key, path in (("reference", target), ("heldout", held)):
        if path:
            loaded[key] = load_reference(path)
            loaded[key].require_extractor(built.name, digest, Path(path))
    with ProgressTracker(quiet=json) as tracker:
        document = score(
            load_model(model),
            reference=loaded["reference"],
            heldout=loaded.get("heldout"),
            extractor=built,
            metrics=[m.strip() for m in metrics.split(",")],
            num_images=num_images,
            repeats=repeats,
            sampler=_sampler(model, solver, steps),
            batch=batch,
            device=device,
            seed=seed,
            tracker=tracker,
        )
    if json:
        print_json({"model": str(model), **document})
        return
    rows = [
        [key, interval_text(value), f"{value['min']:.3f}"] for key, value in document["fid"].items()
    ]
    last = seed + num_images * repeats - 1
    title = f"FID, N = {num_images:,}, {repeats} repeats, seeds {seed}-{last}"
    print_table(title, ["statistics", "mean [95 % interval]", "minimum"], rows)


def _sampler(model: Path, solver: str | None, steps: int | None) -> SamplerConfig:
    import dataclasses

    from merge_rl.config import SamplerConfig
    from merge_rl.core.sampling import count_network_calls
    from merge_rl.workflows.defaults import find_surroundings

    near = find_surroundings(model).sampler or SamplerConfig()
    chosen = dataclasses.replace(
        near, solver=solver or near.solver, num_steps=near.num_steps if steps is None else steps
    )
    count_network_calls(chosen.solver, chosen.num_steps)  # refuses an unknown solver
    return chosen
