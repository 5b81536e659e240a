"""`mergerl reference`: statistics of real images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from merge_rl.cli import ranks
from merge_rl.cli.options import build, with_settings
from merge_rl.cli.output import (
    JsonFlag,
    ProgressTracker,
    note_unused_gpu,
    print_json,
    print_table,
    say,
)
from merge_rl.config import ReferenceConfig
from merge_rl.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(reference)


@with_settings(ReferenceConfig)
def reference(
    images: Annotated[
        Path, typer.Argument(metavar="IMAGES", help="Folder, .zip or .npz of images.")
    ],
    settings: Mapping[str, Any],
    out: Annotated[Path, typer.Option(help="The .safetensors to write.")],
    extractor: Annotated[str, typer.Option(help="Feature extractor, or package.module:factory.")],
    extractor_weights: Annotated[
        str | None, typer.Option(help="Its weights: file, folder, or public name.")
    ] = None,
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Reference statistics of real images, to optimise against and to report.

    Images stream through the extractor, so their number does not matter. Interrupted, the same
    command goes on where it was. Labels come from a dataset.json beside the images.
    """
    from merge_rl.workflows.assembly import build_extractor
    from merge_rl.workflows.reference import build_reference

    config = build(ReferenceConfig, settings)
    if not images.exists():
        raise ConfigError(f"{images}: no such file or folder")
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
        _show(document)


def _show(document: Mapping[str, Any]) -> None:
    """A line for each file of statistics."""
    size = document["resolution"]
    rows = [
        [file["out"], f"{file['images']:,}", f"{file['features_kept']:,}"]
        for file in document["files"]
    ]
    title = f"{document['dim']} features of {document['extractor']}"
    title += f", {size} x {size}" if size else ""
    print_table(title, ["statistics", "images", "features kept"], rows)
