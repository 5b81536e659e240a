"""`mergerl sample`, and what networks are sampled with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from merge_rl.cli.options import MODEL_HELP, build, integer, meant, positive, with_settings
from merge_rl.cli.output import JsonFlag, ProgressTracker, note, print_json, say, tell
from merge_rl.config import GenerationConfig, SampleConfig, SamplerConfig, to_mapping
from merge_rl.errors import ConfigError
from merge_rl.own_code import allow
from merge_rl.progress import counted

if TYPE_CHECKING:
    from torch import Tensor, nn

    from merge_rl.interfaces import Autoencoder

Generating = TypeVar("Generating", bound=GenerationConfig)


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(sample)


@with_settings(SampleConfig)
def sample(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL", help=MODEL_HELP),
    ],
    settings: Mapping[str, Any],
    out: Annotated[
        Path, typer.Option(help="Picture to write; its ending says of which kind.")
    ] = Path("samples.png"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite it.")] = False,
    label: Annotated[
        int | None,
        typer.Option(
            "--class", help="One class for all.", show_default="each in turn", parser=integer
        ),
    ] = None,
    columns: Annotated[
        int | None,
        typer.Option(help="Columns of the grid.", show_default="square", parser=positive),
    ] = None,
    zoom: Annotated[
        int | None,
        typer.Option(help="Enlarge pixels.", show_default="that of small images", parser=positive),
    ] = None,
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Generate a grid of images. The same seed is the same image, whatever the batch.

    Of several models, grids side by side on equal seeds, each with its name.

    [bold]mergerl sample digits/edm2 runs/a --num-images 40 --out side.png[/bold]
    """
    from merge_rl.storage.files import locked_output, write_picture

    require_free(out, force=force)
    names = names_of(models)
    with locked_output(out):  # which tries before the images are made whether it can be written
        found = [
            generated(meant(model), settings, label, name, quiet=json)
            for model, name in zip(models, names if len(models) > 1 else [""], strict=True)
        ]
        if len({classes for _, _, classes in found}) > 1:
            counts = ", ".join(f"{m} {c}" for m, (_, _, c) in zip(models, found, strict=True))
            raise ConfigError(f"expected models of equally many classes, got {counts}")
        write_picture(out, picture_of(found, names, columns, zoom))
    first, count = build(SampleConfig, settings).seed, len(found[0][1])
    if json:
        document = {"out": str(out), "images": count, "first_seed": first}
        shown = {"labels": found[0][1].tolist(), "models": [str(model) for model in models]}
        print_json({**document, **shown})
    else:
        of = f" of each of {len(models)} models" if len(models) > 1 else ""
        seeds = f"seeds {first}-{first + count - 1}" if count > 1 else f"seed {first}"
        tell(f"wrote {counted(count, 'image')}{of}, {seeds}, to {out}")


def picture_of(
    found: Sequence[tuple[Tensor, Tensor, int]],
    names: Sequence[str],
    columns: int | None,
    zoom: int | None,
) -> Tensor:
    """A grid (1 or 3, H, W) uint8 of each model's images, under their names where several are."""
    from merge_rl.storage.files import enlarge, image_grid, side_by_side

    grids = []
    for images, _, classes in found:
        tens = 10 if classes == 10 and len(images) % 10 == 0 else None
        grid = image_grid(images, columns or tens)
        grids.append(enlarge(grid, zoom or max(1, 480 // grid.shape[-1])))
    if len(grids) == 1:
        return grids[0]
    return side_by_side(list(zip(names, grids, strict=True)))


def require_free(out: Path, *, force: bool) -> None:
    """Raise ConfigError for a name that is no picture's, or that is taken."""
    from merge_rl.storage.files import picture_format

    picture_format(out)
    if out.is_dir():
        raise ConfigError(f"{out}: expected a picture to write, found a folder")
    if out.exists() and not force:
        raise ConfigError(f"{out} exists already; expected another --out, or --force")


def generated(
    model: Path, settings: Mapping[str, Any], label: int | None, name: str, *, quiet: bool
) -> tuple[Tensor, Tensor, int]:
    """Images (N, C, H, W) uint8 of a model, their labels (N,), and how many classes it has.

    `name` is what it is called while they are made, where there are several models.
    """
    from merge_rl.workflows.assembly import load_network, network_rollout
    from merge_rl.workflows.rollout import Rollout

    config, sampler = generation_settings(SampleConfig, settings, model)
    require_named(model, config)
    network = load_network(model, config.network)
    classes = int(getattr(network, "label_dim", 0))
    labels = labels_of(config.num_images, classes, label)
    decoder = find_autoencoder(model, network, config)
    with ProgressTracker(quiet=quiet) as tracker:
        rollout = network_rollout(
            network, sampler, config.batch, config.device, Rollout,
            autoencoder=decoder, on_images=tracker.advance, announce=note,
        )  # fmt: skip
        tracker.phase(f"sample {name}".rstrip(), config.num_images)
        seeds = range(config.seed, config.seed + config.num_images)
        images = rollout.images(rollout.noise(seeds), labels)
    if images.ndim != 4 or str(images.dtype) != "torch.uint8":
        raise ConfigError(
            f"{model}: samples of shape {list(images.shape[1:])} are no pictures; expected an "
            "--autoencoder that makes some, or merge_rl.sample from Python"
        )
    return images, labels, classes


def names_of(models: Sequence[Path]) -> list[str]:
    """As little of the end of each path as tells them apart."""
    plain = [Path(str(model).removesuffix(".safetensors")) for model in models]
    for parts in range(1, max(len(path.parts) for path in plain) + 1):
        short = [str(Path(*path.parts[-parts:])) for path in plain]
        if len(set(short)) == len(set(plain)):
            break
    return short


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

    found = find_defaults(model)
    near = found.sampler or SamplerConfig()
    config = build(cls, settings, near=to_mapping(near))
    sampler = config.sampler or near
    if said := settings.get("sampler", {}).get("guide_network"):
        allow(said)
    if found.note is not None and sampler.guidance == near.guidance:
        note(found.note)
    require_solver(sampler.solver)
    if sampler.guide is not None:
        sampler = replace(sampler, guide=str(meant(Path(sampler.guide))))
    return config, sampler


def require_named(model: Path, config: GenerationConfig, *more: str) -> None:
    """Refuse what model and run name for what is to be done, and what is not allowed or gone."""
    from merge_rl.workflows.assembly import require_parts_of

    parts = ("network", "autoencoder", "autoencoder_weights", *more)
    unsaid = [part for part in parts if getattr(config, part) is None]
    require_parts_of(model, [*unsaid, "guide"])


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
