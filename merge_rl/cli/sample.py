"""`mergerl sample`, and what networks are sampled with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from merge_rl.cli.options import build, integer, positive, with_settings
from merge_rl.cli.output import JsonFlag, ProgressTracker, note_all, print_json, say
from merge_rl.config import GenerationConfig, SampleConfig, SamplerConfig, to_mapping
from merge_rl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from merge_rl.interfaces import Autoencoder

Generating = TypeVar("Generating", bound=GenerationConfig)


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(sample)


@with_settings(SampleConfig)
def sample(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Model folder, or one .safetensors of a set."),
    ],
    settings: Mapping[str, Any],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("samples.png"),
    label: Annotated[
        int | None,
        typer.Option(
            "--class", help="One class for all.", show_default="each in turn", parser=integer
        ),
    ] = None,
    columns: Annotated[
        int | None, typer.Option(help="Of the grid.", show_default="square", parser=positive)
    ] = None,
    zoom: Annotated[
        int | None,
        typer.Option(help="Enlarge pixels.", show_default="that of small images", parser=positive),
    ] = None,
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Generate a grid of images. The same seed is the same image, whatever the batch."""
    from merge_rl.storage.files import enlarge, image_grid, write_png
    from merge_rl.workflows.assembly import load_network, network_rollout
    from merge_rl.workflows.rollout import Rollout

    model = meant(model)
    config, sampler = generation_settings(SampleConfig, settings, model)
    network = load_network(model)
    classes = int(getattr(network, "label_dim", 0))
    num, labels = config.num_images, labels_of(config.num_images, classes, label)
    decoder = find_autoencoder(model, network, config)
    with ProgressTracker(quiet=json) as tracker:
        rollout = network_rollout(
            network, sampler, config.batch, config.device, Rollout,
            autoencoder=decoder, on_images=tracker.advance,
        )  # fmt: skip
        tracker.phase("sample", num)
        seeds = range(config.seed, config.seed + num)
        images = rollout.images(rollout.noise(seeds), labels)
    grid = image_grid(images, columns or (10 if classes == 10 and num % 10 == 0 else None))
    write_png(out, enlarge(grid, zoom or max(1, 480 // grid.shape[-1])))
    if json:
        listed = {"first_seed": config.seed, "labels": labels.tolist()}
        print_json({"out": str(out), "images": num, **listed})
    else:
        typer.echo(f"wrote {num} images, seeds {seeds[0]}-{seeds[-1]}, to {out}")


def labels_of(count: int, classes: int, label: int | None) -> Tensor:
    """A class for each image (count,): the one that is named, or all of them in turn."""
    import torch

    from merge_rl.core.sampling.compatibility import balanced_labels

    if label is None:
        return balanced_labels(count, classes)
    if not 0 <= label < classes:
        known = f"in 0..{classes - 1}" if classes else "left out, the network has no classes"
        raise ConfigError(f"expected --class {known}, got {label}")
    return torch.full((count,), label)


def generation_settings(
    cls: type[Generating], settings: Mapping[str, Any], model: Path
) -> tuple[Generating, SamplerConfig]:
    """What was said, and the sampler: as said one by one, else as the model's run or set says."""
    from merge_rl.core.sampling.compatibility import require_solver
    from merge_rl.workflows.assembly import find_defaults

    near = find_defaults(model).sampler or SamplerConfig()
    config = build(cls, settings, near=to_mapping(near))
    sampler = config.sampler or near
    require_solver(sampler.solver)
    return config, sampler


def meant(model: Path, track: str | None = None) -> Path:
    """The model that a run, a set, a folder or a name of the Hub means, with a note of which."""
    from merge_rl.workflows.assembly import find_model

    found = find_model(model, track)
    note_all([found.note] if found.note else [])
    return found.path


def find_autoencoder(model: Path, network: nn.Module, config: GenerationConfig) -> Autoencoder:
    """What makes images of a network's samples: as said, else as its run or set says."""
    from merge_rl.workflows.assembly import find_defaults, load_autoencoder

    near = find_defaults(model)
    own = config.autoencoder in (None, near.autoencoder)
    built, _ = load_autoencoder(
        config.autoencoder or near.autoencoder,
        config.autoencoder_weights or (near.autoencoder_weights if own else None),
        shape=[int(n) for n in network.sample_shape],  # type: ignore[union-attr]
        dtype=near.autoencoder_dtype,
        announce=say,
    )
    return built
