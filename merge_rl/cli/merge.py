"""`mergerl merge`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from merge_rl.cli.output import JsonFlag, note_all, print_json, print_table
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
        str | None,
        typer.Option(
            help="Rebuild the power-function EMA of this relative width; several, such as "
            '"0.05,0.10" or "0.010,0.015,...,0.250", become a new set of checkpoints in OUT, '
            "made in one pass over the files."
        ),
    ] = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="The plain average.")] = False,
    track: Annotated[str | None, typer.Option(help="Series of the manifest to use.")] = None,
    base: Annotated[
        str, typer.Option(help="Checkpoint whose buffers are carried; by name.")
    ] = "newest",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16 or bfloat16. \\[default: float32, or the recipe's]"),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(help="Above it the weights are split, such as 500MB. \\[default: 5GB]"),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", help="Of the merge. \\[default: that of the checkpoints]"),
    ] = None,
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Merge once, with given coefficients, a recipe, an EMA profile or the plain average.

    OUT gets model.safetensors, config.json, a model card and merge.yaml: a recipe from which
    [bold]--recipe[/bold] makes the same file again, bit for bit.
    """
    from merge_rl.core.merging.ema_profiles import parse_std_list
    from merge_rl.storage.checkpoints import open_checkpoints, plan_merge
    from merge_rl.storage.files import MAX_SHARD_BYTES, require_new
    from merge_rl.workflows.export import TOOL, Recipe, merged_licence, save_merge

    ways = [coefficients is not None, recipe is not None, ema_std is not None, uniform]
    if sum(ways) != 1:
        raise ConfigError(
            "expected exactly one of --coefficients, --recipe, --ema-std and --uniform, "
            f"got {sum(ways)}"
        )
    require_new(out)
    limit = parse_size(max_shard_size) if max_shard_size else None
    stds = parse_std_list(ema_std) if ema_std else []
    known = Recipe(recipe) if recipe else None
    # A recipe may name a checkpoint and a copy of it; it makes the same file again.
    opened = open_checkpoints(checkpoints, track=track, distinct=known is None)
    if known and set(known.names) < set(opened.names):
        opened = open_checkpoints(checkpoints, track=track, select=known.names, distinct=False)
    if stds and track is None and None in opened.ema_std:
        # A profile is rebuilt from profiles; raw snapshots of the same set have no part in it.
        pairs = zip(opened.names, opened.ema_std, strict=True)
        profiles = [name for name, width in pairs if width is not None]
        opened = open_checkpoints(checkpoints, select=profiles) if profiles else opened
    if known is None:
        note_all(opened.notes)
    terms = merged_licence(opened, licence or (known.licence if known else None))
    if len(stds) > 1:
        _merge_profiles(opened, out, stds, base, dtype or "float32", terms, json=json)
        return
    groups, start = (known.groups, known.base) if known else ({}, base)
    values = known.coefficients(opened) if known else _coefficients(opened, coefficients, stds)
    save_merge(
        out, opened, values,
        plan=plan_merge(opened, groups=groups, base=start),
        groups=groups,
        dtype=dtype or (known.dtype if known else "float32"),
        max_shard_bytes=limit or (known.max_shard_bytes if known else MAX_SHARD_BYTES),
        licence=terms,
        tool=known.tool if known else TOOL,
        how=_how(coefficients, stds, recipe),
    )  # fmt: skip
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


def _how(coefficients: str | None, stds: Sequence[float], recipe: Path | None) -> str:
    if recipe is not None:
        return "Made again from a recipe."
    if stds:
        return f"The power-function EMA of relative width {stds[0]:.3f}, rebuilt after training."
    if coefficients is None:
        return "The plain average."
    return "Merged with coefficients that were given."


def _merge_profiles(
    opened: CheckpointSet,
    out: Path,
    stds: Sequence[float],
    base: str,
    dtype: str,
    licence: str | None,
    *,
    json: bool,
) -> None:
    from merge_rl.workflows.export import save_profiles

    names = save_profiles(out, opened, stds, base=base, dtype=dtype, licence=licence)
    if json:
        print_json({"out": str(out), "checkpoints": names})
        return
    rows = [[name, f"{std:.3f}"] for name, std in zip(names, stds, strict=True)]
    print_table(f"{len(opened)} snapshots to {len(names)} profiles in {out}", ["file", "std"], rows)


def parse_size(text: str) -> int:
    """Bytes of "500MB", "5GB", "2GiB" or a plain number."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = units.get(match.group(2).upper()) if match else None
    size = int(float(match.group(1)) * unit) if match and unit else 0
    if size < 1:
        raise ConfigError(f"expected a size such as 500MB or 5GB, got {text!r}")
    return size


def _coefficients(opened: CheckpointSet, text: str | None, stds: Sequence[float]) -> Tensor:
    import torch

    from merge_rl.workflows.export import ema_coefficients

    if stds:
        return ema_coefficients(opened, stds[0])
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
