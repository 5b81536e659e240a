"""`mergerl convert`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merge_rl.cli.inspect import width_text
from merge_rl.cli.options import build, named, with_settings
from merge_rl.cli.output import ByteTracker, JsonFlag, print_json, tell
from merge_rl.cli.tables import print_table
from merge_rl.config import ConvertConfig
from merge_rl.errors import ConfigError, quoted

if TYPE_CHECKING:
    from merge_rl.storage.convert import ConvertResult


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(convert)


@with_settings(ConvertConfig)
def convert(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="SRC... DIR", help="Files, folders of them, or user/repo; last, where to."
        ),
    ],
    settings: Mapping[str, Any],
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Turn checkpoints of any network into safetensors, not running them.

    EDM2: network snapshots (.pkl), and training-state-*.pt where they are named one by one or have
    their folder to themselves. SiT, DiT, REPA and JiT: released weights and training checkpoints
    (.pt, .pth). Of any network: state dicts, post-hoc EMA folders, Lightning's .ckpt, folders of
    accelerate, diffusers, DeepSpeed and torch.distributed, Composer's .pt, LoRA adapters of PEFT;
    each format is told by what the files hold. A pickle can run any program when it is loaded;
    here it is read as data, and a file that asks for anything else is refused by what it asks for.
    Types are kept: float16 stays float16.

    All files must be of the same network. What is in DIR already and sound is kept, so start an
    interrupted conversion again as it was:

    [bold]mergerl convert network-snapshot-*.pkl ckpts/[/bold]

    [bold]mergerl convert results/000-SiT-XL-2/checkpoints ckpts/ --weights both[/bold]

    [bold]mergerl convert post-hoc-ema-checkpoints ckpts/ --ema-std 0.05,0.28 --update-every
    10[/bold]

    Then look at it with [bold]mergerl inspect ckpts/[/bold].
    """
    from merge_rl.storage.hub import convert as run_convert

    config = build(ConvertConfig, settings)
    if len(paths) < 2:
        raise ConfigError("expected what to convert and the folder to write to: SRC... DIR")
    *sources, folder = paths
    for source in sources:
        require_convertible(source)
    with ByteTracker(quiet=json) as tracker:
        result = run_convert(
            [named(source) for source in sources], folder, config=config, tracker=tracker
        )
    _show(result, json=json)


def require_convertible(source: Path) -> None:
    """Raise ConfigError for a run, whose weights need no conversion."""
    from merge_rl.storage.runs import described, folder_kind

    kind = folder_kind(source) if source.is_dir() else "file"
    if kind == "damaged run":
        raise ConfigError(f"{source}: expected checkpoints, found {described(source)}")
    if kind in ("run", "fine-tuning run", "comparison"):
        raise ConfigError(f"{source}: a {kind}, whose weights are .safetensors: nothing to convert")


def _show(result: ConvertResult, *, json: bool) -> None:
    from merge_rl.storage.checkpoints import read_manifest

    manifest, folder = read_manifest(result.manifest), result.manifest.parent
    status = dict.fromkeys(result.written, "new") | dict.fromkeys(result.skipped, "kept")
    rows: list[dict[str, Any]] = [
        {
            "file": entry.file,
            "status": status[folder / entry.file],
            "bytes": (folder / entry.file).stat().st_size,
            "track": entry.track,
            "nimg": entry.nimg,
            "ema_std": entry.ema_std,
            "ema_gamma": entry.ema_gamma,
            "ema_start": entry.ema_start,
            "sha256": entry.sha256,
        }
        for entry in manifest.checkpoints
        if folder / entry.file in status
    ]
    if json:
        print_json(
            {
                "folder": str(folder),
                "manifest": str(result.manifest),
                "model": dict(manifest.model),
                "licence": manifest.licence,
                "checkpoints": rows,
                "deleted": [str(path) for path in result.deleted],
            }
        )
        return
    title = f"{folder}: {len(result.written)} written, {len(result.skipped)} kept"
    title += f", {len(result.deleted)} sources deleted" if result.deleted else ""
    print_table(
        title,
        ["checkpoint", "track", "nimg", "ema_std", "MB", ""],
        [
            [
                str(row["file"]).removesuffix(".safetensors"),
                *(_text(row[key]) for key in ("track", "nimg")),
                width_text(row["ema_std"], row["ema_gamma"]) or "-",
                f"{row['bytes'] / 1e6:.1f}",
                str(row["status"]),
            ]
            for row in rows
        ],
    )
    tell(f"next: mergerl inspect {quoted(folder)}")


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else str(value)
