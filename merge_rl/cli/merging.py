"""`mergerl merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merge_rl.cli.output import JsonFlag, print_json, print_table
from merge_rl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from merge_rl.storage.checkpoints import CheckpointSet


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(merge)


def merge(
    checkpoints: Annotated[Path, typer.Argument(metavar="CKPTS", help="Folder of checkpoints.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Model folder to write.")],
    coefficients: Annotated[
        str | None,
        typer.Option(help='One number a checkpoint, in the set\'s order: "0.2,-0.1,0.9".'),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A merge.yaml; hashes of the sources are checked.")
    ] = None,
    ema_std: Annotated[
        float | None, typer.Option(help="Rebuild the power-function EMA of this relative width.")
    ] = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="The plain average.")] = False,
    track: Annotated[str | None, typer.Option(help="Series of the manifest to use.")] = None,
    base: Annotated[
        str, typer.Option(help="Checkpoint whose buffers are carried; by name.")
    ] = "newest",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16 or bfloat16. [default: float32, or the recipe's]"),
    ] = None,
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Merge once, with given coefficients, a recipe, an EMA profile or the plain average."""
    from merge_rl.storage.checkpoints import open_checkpoints
    from merge_rl.workflows.export import merge_recipe, require_new, save_model
    from merge_rl.workflows.merging import base_index
    from merge_rl.workflows.models import merge as merge_weights
    from merge_rl.workflows.recipe import Recipe

    ways = [coefficients is not None, recipe is not None, ema_std is not None, uniform]
    if sum(ways) != 1:
        raise ConfigError(
            "expected exactly one of --coefficients, --recipe, --ema-std and --uniform, "
            f"got {sum(ways)}"
        )
    require_new(out)
    opened = open_checkpoints(checkpoints, track=track)
    known = Recipe(recipe) if recipe else None
    if known and set(known.names) < set(opened.names):
        # The others would get 0, but even so their rows would change how the sums round.
        opened = open_checkpoints(checkpoints, track=track, select=known.names)
    if ema_std is not None and track is None and None in opened.ema_std:
        # A profile is rebuilt from profiles; raw snapshots of the same set have no part in it.
        pairs = zip(opened.names, opened.ema_std, strict=True)
        profiles = [name for name, width in pairs if width is not None]
        opened = open_checkpoints(checkpoints, select=profiles) if profiles else opened
    groups, start = (known.groups, known.base) if known else ({}, base)
    values = known.coefficients(opened) if known else _coefficients(opened, coefficients, ema_std)
    weights = merge_weights(opened, values, groups=groups, base=start)
    written = merge_recipe(opened, values, base=base_index(opened, start), groups=groups)
    stored = dtype or (known.dtype if known else "float32")
    save_model(out, weights, opened.config, recipe=written, dtype=stored)
    rows = values.reshape(-1, len(opened)).T.tolist()
    if json:
        print_json({"out": str(out), "coefficients": dict(zip(opened.names, rows, strict=True))})
        return
    print_table(
        f"merged {len(opened)} checkpoints into {out}",
        ["checkpoint", "coefficients"],
        [
            [n, " ".join(f"{v:+.4f}" for v in row)]
            for n, row in zip(opened.names, rows, strict=True)
        ],
    )


def _coefficients(opened: CheckpointSet, text: str | None, ema_std: float | None) -> Tensor:
    import torch

    from merge_rl.workflows.models import ema_coefficients

    if ema_std is not None:
        return ema_coefficients(opened, ema_std)
    count = len(opened)
    if text is None:
        return torch.full((count,), 1 / count, dtype=torch.float64)
    try:
        values = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"expected numbers in --coefficients, got {text!r}") from None
    if len(values) != count:
        raise ConfigError(
            f"expected {count} coefficients, one for each checkpoint, got {len(values)}"
        )
    return torch.tensor(values, dtype=torch.float64)
