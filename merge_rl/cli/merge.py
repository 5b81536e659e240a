"""`mergerl merge`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merge_rl.cli.options import build, meant_set, named, with_settings
from merge_rl.cli.output import JsonFlag, note_all, print_json
from merge_rl.cli.tables import print_table
from merge_rl.config import SingleMergeConfig, byte_count, numbers_in, real_number
from merge_rl.errors import ConfigError
from merge_rl.own_code import require_allowed
from merge_rl.progress import counted

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from merge_rl.storage.checkpoints import CheckpointSet
    from merge_rl.workflows.export import Recipe


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(merge)


@with_settings(SingleMergeConfig)
def merge(
    checkpoints: Annotated[
        Path, typer.Argument(metavar="CKPTS", help="Folder of checkpoints, or user/repo.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Model folder to write.")],
    settings: Mapping[str, Any],
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Merge once: with coefficients, a recipe, an EMA profile or the plain average.

    OUT gets model.safetensors, config.json, a model card and merge.yaml: a recipe from which
    [bold]--recipe[/bold] makes the same file again, bit for bit.

    [bold]mergerl merge digits/edm2 average --track raw --uniform[/bold]

    [bold]mergerl merge digits/edm2 narrow --ema-std 0.07[/bold]
    """
    from merge_rl.storage.checkpoints import merged_licence
    from merge_rl.storage.files import require_new
    from merge_rl.workflows.export import Recipe

    config, checkpoints = build(SingleMergeConfig, settings), meant_set(checkpoints)
    require_new(out)
    if config.max_shard_size:
        parse_size(config.max_shard_size)
    stds = _widths(config.ema_std) if config.ema_std else []
    known = Recipe(named(Path(config.recipe))) if config.recipe else None
    opened = _open(checkpoints, config, known)
    terms = merged_licence(opened, config.licence or (known.licence if known else None))
    if len(stds) > 1:
        if config.freeze:
            raise ConfigError("--freeze goes with one merge; expected one width of --ema-std")
        dtype = config.dtype or "float32"
        _merge_profiles(opened, out, stds, config.base, dtype, terms, json=json)
        return
    values = known.coefficients(opened) if known else _coefficients(opened, config, stds)
    _save(out, opened, values, config, known, terms)
    rows = values.reshape(-1, len(opened)).T.tolist()
    if json:
        print_json({"out": str(out), "coefficients": dict(zip(opened.names, rows, strict=True))})
        return
    print_table(
        f"merged {counted(len(opened), 'checkpoint')} into {out}",
        ["checkpoint", "coefficients"],
        [
            [n, " ".join(f"{v:+.4f}" for v in row)]
            for n, row in zip(opened.names, rows, strict=True)
        ],
    )


def _open(checkpoints: Path, config: SingleMergeConfig, known: Recipe | None) -> CheckpointSet:
    """The checkpoints that are merged: those of the recipe, or of the series."""
    from merge_rl.storage.checkpoints import open_checkpoints

    # A recipe may name a checkpoint and a copy of it; it makes the same file again.
    track = config.track
    opened = open_checkpoints(checkpoints, track=track, distinct=known is None)
    if known and set(known.names) < set(opened.names):
        opened = open_checkpoints(checkpoints, track=track, select=known.names, distinct=False)
    if config.ema_std and track is None and None in opened.ema_gamma:
        # A profile is rebuilt from profiles; raw snapshots of the same set have no part in it.
        pairs = zip(opened.names, opened.ema_gamma, strict=True)
        profiles = [name for name, gamma in pairs if gamma is not None]
        opened = open_checkpoints(checkpoints, select=profiles) if profiles else opened
    if known is None:
        note_all(opened.notes)
    if config.network is not None:
        from merge_rl.workflows.assembly import with_network

        with_network(opened, config.network)
    elif known is not None and known.network is not None:  # else it would make another file
        require_allowed(known.network, "network", "--network", str(known.path))
    return opened


def _save(
    out: Path,
    opened: CheckpointSet,
    values: npt.NDArray[np.float64],
    config: SingleMergeConfig,
    known: Recipe | None,
    licence: str | None,
) -> None:
    """Write the model folder; what is not said is the recipe's."""
    from merge_rl.storage.checkpoints import plan_merge
    from merge_rl.storage.files import MAX_SHARD_BYTES
    from merge_rl.workflows.export import save_merge

    groups, start = (known.groups, known.base) if known else ({}, config.base)
    limit = parse_size(config.max_shard_size) if config.max_shard_size else None
    save_merge(
        out, opened, values,
        plan=plan_merge(
            opened, groups=groups, base=start,
            freeze=config.freeze or (known.frozen if known else ()),
        ),
        groups=groups,
        dtype=config.dtype or (known.dtype if known else "float32"),
        max_shard_bytes=limit or (known.max_shard_bytes if known else MAX_SHARD_BYTES),
        licence=licence,
        known=known,
        how=known.how if known else _how(config),
    )  # fmt: skip


def _how(config: SingleMergeConfig) -> str:
    if config.ema_std:
        width = _widths(config.ema_std)[0]
        return f"The power-function EMA of relative width {width:.3f}, rebuilt after training."
    if config.coefficients is None:
        return "The plain average."
    return "Merged with coefficients that were given."


def _widths(text: str) -> list[float]:
    from merge_rl.core.merging.ema_profiles import parse_std_list

    return parse_std_list(text)


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
    size = byte_count(text)
    if size is None or size < 1:
        raise ConfigError(f"expected a size such as 500MB or 5GB, got {text!r}")
    return size


def _coefficients(
    opened: CheckpointSet, config: SingleMergeConfig, stds: Sequence[float]
) -> npt.NDArray[np.float64]:
    import numpy as np

    from merge_rl.workflows.export import ema_coefficients

    if stds:
        return ema_coefficients(opened, stds[0]).numpy()
    count, text = len(opened), config.coefficients
    if text is None:
        return np.full(count, 1 / count)
    values = numbers_in(text, real_number)
    if values is None:
        raise ConfigError(f"expected numbers in --coefficients, got {text!r}")
    if len(values) != count:
        raise ConfigError(
            f"expected {count} coefficients, one for each checkpoint, got {len(values)}"
        )
    return np.array(values, np.float64)
