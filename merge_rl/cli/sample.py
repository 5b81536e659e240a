"""`mergerl sample`, and what networks are sampled with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merge_rl.cli import options
from merge_rl.cli.output import JsonFlag, ProgressTracker, print_json, say
from merge_rl.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from merge_rl.config import SamplerConfig
    from merge_rl.interfaces import Autoencoder


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(sample)


MODEL_HELP = "Model folder, or one .safetensors of a set."


def sample(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("samples.png"),
    num: Annotated[int, typer.Option(help="Images.")] = 64,
    seed: Annotated[int, typer.Option(help="First image seed; one seed an image.")] = 0,
    label: Annotated[
        int | None, typer.Option("--class", help="One class for all. \\[default: each in turn]")
    ] = None,
    columns: Annotated[
        int | None, typer.Option(min=1, help="Of the grid. \\[default: square]")
    ] = None,
    zoom: Annotated[
        int | None, typer.Option(min=1, help="Enlarge pixels. \\[default: small images]")
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
    batch: Annotated[int, typer.Option(min=1, help="Images in one forward pass.")] = 250,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Generate a grid of images. The same seed is the same image, whatever the batch."""
    import torch

    from merge_rl.core.sampling.compatibility import balanced_labels
    from merge_rl.storage.files import enlarge, image_grid, write_png
    from merge_rl.workflows.assembly import load_model
    from merge_rl.workflows.evaluate import network_rollout

    if num < 1:
        raise ConfigError(f"expected at least 1 image, got {num}")
    network = load_model(model)
    classes = int(getattr(network, "label_dim", 0))
    if label is not None and not 0 <= label < classes:
        known = f"in 0..{classes - 1}" if classes else "left out, the network has no classes"
        raise ConfigError(f"expected --class {known}, got {label}")
    labels = balanced_labels(num, classes) if label is None else torch.full((num,), label)
    sampler = find_sampler(
        model, solver=solver, num_steps=steps, guidance=guidance, guide=guide,
        diffusion=diffusion, last_step=last_step, low_memory=low_memory or None, fast=fast,
        other=sampler_setting,
    )  # fmt: skip
    decoder = find_autoencoder(model, network, autoencoder, autoencoder_weights)
    with ProgressTracker(quiet=json) as tracker:
        rollout = network_rollout(
            network, sampler, batch, device, autoencoder=decoder, on_images=tracker.advance
        )
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


def find_autoencoder(
    model: Path, network: nn.Module, name: str | None, weights: str | None
) -> Autoencoder:
    """What makes images of a network's samples: as said, else as its run or set says."""
    from merge_rl.workflows.assembly import find_surroundings, load_autoencoder

    near = find_surroundings(model)
    own = name in (None, near.autoencoder)
    built, _ = load_autoencoder(
        name or near.autoencoder,
        weights or (near.autoencoder_weights if own else None),
        shape=[int(n) for n in network.sample_shape],  # type: ignore[union-attr]
        dtype=near.autoencoder_dtype,
        announce=say,
    )
    return built


def find_sampler(
    model: Path, *, guide: Path | None, fast: bool, other: list[str] | None, **given: Any
) -> SamplerConfig:
    """Sampler settings: as said one by one, else as the model's run or set says."""
    from merge_rl.workflows.assembly import find_surroundings

    values = {**given, "guide": None if guide is None else str(guide)}
    near = find_surroundings(model).sampler
    return options.choose_sampler(near, values, fast=fast, other=other or [])
