"""`mergerl reference`: statistics of real images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from merge_rl.cli import ranks
from merge_rl.cli.output import (
    JsonFlag,
    ProgressTracker,
    note_unused_gpu,
    print_json,
    print_table,
    say,
)
from merge_rl.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(reference)


def reference(
    images: Annotated[
        Path, typer.Argument(metavar="IMAGES", help="Folder, .zip or .npz of images.")
    ],
    out: Annotated[Path, typer.Option(help="The .safetensors to write.")],
    extractor: Annotated[str, typer.Option(help="Feature extractor, or package.module:factory.")],
    extractor_weights: Annotated[
        str | None, typer.Option(help="Its weights: file, folder, or public name.")
    ] = None,
    keep_features: Annotated[
        bool, typer.Option("--keep-features", help="Store features too: KID, MMD, precision.")
    ] = False,
    max_features: Annotated[
        int, typer.Option(min=2, help="Rows of features to store at most, spread evenly.")
    ] = 50_000,
    split: Annotated[
        bool,
        typer.Option("--split", help="Two halves, OUT-a and OUT-b: optimise by one, report both."),
    ] = False,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out unreadable images, and count them.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="A subset of this many images.")] = None,
    balanced: Annotated[
        bool, typer.Option("--balanced", help="The same number of each class; needs labels.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the subset and of the halves.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images in one forward pass.")] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Reference statistics of real images, to optimise against and to report.

    Images stream through the extractor, so their number does not matter. Interrupted, the same
    command goes on where it was. Labels come from a dataset.json beside the images.
    """
    from merge_rl.workflows.assembly import build_extractor
    from merge_rl.workflows.reference import build_reference

    if not images.exists():
        raise ConfigError(f"{images}: no such file or folder")
    device = ranks.own_device(device)
    note_unused_gpu(device)
    built, digest = build_extractor(extractor, extractor_weights, device, say)
    with ProgressTracker(quiet=json) as tracker:
        document = build_reference(
            images,
            out,
            extractor=built,
            extractor_sha256=digest,
            batch=batch,
            device=device,
            keep_features=max_features if keep_features else 0,
            split=split,
            skip_broken=skip_broken,
            limit=limit,
            balanced=balanced,
            seed=seed,
            tracker=tracker,
        )
    if json:
        print_json(document)
        return
    size = (
        f", {document['resolution']} x {document['resolution']}" if document["resolution"] else ""
    )
    rows = [
        [file["out"], f"{file['images']:,}", f"{file['features_kept']:,}"]
        for file in document["files"]
    ]
    title = f"{document['dim']} features of {document['extractor']}{size}"
    print_table(title, ["statistics", "images", "features kept"], rows)
