"""`mergerl fetch`, `push`: published checkpoints in, merged models out."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merge_rl.cli.options import MODEL_HELP, build, meant, with_settings
from merge_rl.cli.output import (
    ByteTracker,
    JsonFlag,
    byte_text,
    print_json,
    say,
    tell,
)
from merge_rl.cli.tables import print_table
from merge_rl.config import FetchConfig
from merge_rl.errors import ConfigError, quoted

if TYPE_CHECKING:
    from merge_rl.storage.checkpoints import KnownSet
    from merge_rl.storage.hub import FetchPlan, FetchResult


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(fetch)
    app.command()(push)


def _list_sets(*, as_json: bool) -> None:
    """The sets that `fetch` knows by name."""
    from merge_rl.storage.checkpoints import load_catalogue

    listed = [known for known in load_catalogue().sets if known.urls()]
    if as_json:
        print_json([_set_document(known) for known in listed])
        return
    rows = [[k.name, str(k.resolution), _size_text(k), k.licence] for k in listed]
    title = "published sets, by the names that mergerl fetch takes"
    print_table(title, ["name", "pixels", "files", "licence"], rows, words=True)


def _set_document(known: KnownSet) -> dict[str, Any]:
    """A set of the catalogue in the JSON document; `bytes` are those of one file, where known."""
    return {
        "name": known.name,
        "pixels": known.resolution,
        "files": len(known.urls()),
        "bytes": known.tensor_bytes,
        "licence": known.licence,
    }


def _size_text(known: KnownSet) -> str:
    count, size = len(known.urls()), known.tensor_bytes
    return f"{count}" if size is None else f"{count} of {byte_text(size)}"


@with_settings(FetchConfig)
def fetch(
    settings: Mapping[str, Any],
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="Set of the catalogue, user/repo\\[@revision] of the Hub, or an https address.",
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="New folder, or one fetched into before."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what it takes, no more.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    listed: Annotated[
        bool, typer.Option("--list", help="Print the sets of the catalogue, no more.")
    ] = False,
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Download published checkpoints and convert them to safetensors on the way.

    Shows files, sizes and licence first, and asks. Files come one by one; a cut connection is
    resumed, and the same command goes on after an interruption. Snapshots of one run, eight of
    them: [bold]mergerl fetch edm2-img512-xs-raw xs --ema-std 0.05 --last 8 --every 192Mi[/bold]
    """
    from merge_rl.storage.hub import Selection, parse_count, plan_fetch, run_fetch

    if listed:
        _list_sets(as_json=json)
        return
    if name is None or folder is None:
        raise typer.BadParameter("expected NAME and DIR, or --list")
    config = build(FetchConfig, settings)
    every = parse_count(config.every) if config.every is not None else None
    selection = Selection(
        last=config.last, every=every, track=config.track, ema_std=config.ema_std,
        files=config.files,
    )  # fmt: skip
    plan = plan_fetch(
        name, folder, selection=selection, revision=config.revision, sha256=config.sha256,
        delete_original=config.delete_original,
    )  # fmt: skip
    if not json:
        _show_plan(plan)
    if dry_run:
        if json:
            print_json(_plan_document(plan))
        return
    if plan.todo and not yes:
        _ask(plan)
    with ByteTracker() as tracker:
        result = run_fetch(plan, tracker=tracker)
    if json:
        print_json(_plan_document(plan) | _result_document(result))
        return
    tell(f"{len(result.fetched)} files fetched, {len(result.kept)} were there already")
    tell(f"look at them: mergerl inspect {quoted(folder)}")


def push(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help=MODEL_HELP,
        ),
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="user/repo\\[@branch] of the Hub.")],
    public: Annotated[
        bool, typer.Option("--public", help="Let everybody see it. \\[default: private]")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch. \\[default: main]")] = None,
    message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files; send nothing.")
    ] = False,
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Upload a model to the Hub: a finished run's, a set's, a folder's, a file's.

    Weights, config.json, merge.yaml, README.md and pictures; private unless --public. What has
    arrived is not sent again when the command is run once more. The token comes from
    [bold]hf auth login[/bold] or the variable HF_TOKEN; it has no option here, because a command
    line ends up in the history of the shell.

    [bold]mergerl push runs/a user/my-merge[/bold]
    """
    from merge_rl.storage.checkpoints import folder_config
    from merge_rl.workflows.export import load_call
    from merge_rl.workflows.export import push as push_model

    place = meant(model)
    pushed = push_model(
        place,
        repo,
        private=not public,
        revision=revision,
        message=message,
        dry_run=dry_run,
    )
    document = {
        "repo": pushed.repo_id,
        "url": pushed.url,
        "private": pushed.private,
        "commit": pushed.commit,
        "bytes": pushed.size,
        "files": {item.name: item.size for item in pushed.files},
    }
    if json:
        print_json(document)
        return
    rows = [[item.name, byte_text(item.size)] for item in pushed.files]
    seen = "private" if pushed.private else "public"
    verb = "would push" if dry_run else "pushed"
    print_table(f"{verb} {byte_text(pushed.size)} to {pushed.url} ({seen})", ["file", "size"], rows)
    if not dry_run:
        config = folder_config(place) or {}
        tell(f"load it: merge_rl.{load_call(str(config.get('model')), pushed.repo_id)}")


def _show_plan(plan: FetchPlan) -> None:
    rows = [
        [
            file.name,
            f"{file.nimg:,}" if file.nimg is not None else "-",
            f"{file.ema_std:.3f}" if file.ema_std is not None else "-",
            byte_text(file.size or 0),
            "here" if file.name in plan.done else "to download",
        ]
        for file in plan.files
    ]
    print_table(plan.source.name, ["file", "nimg", "ema_std", "size", "state"], rows)
    tell(
        f"{len(plan.files)} files, {byte_text(plan.size)}; to download: "
        f"{byte_text(plan.to_download)}; disk needed: {byte_text(plan.disk_needed)} of "
        f"{byte_text(plan.disk_free)} free; licence: {plan.source.licence or 'not stated'}"
    )


def _ask(plan: FetchPlan) -> None:
    if not sys.stdin.isatty():
        raise ConfigError(
            f"expected --yes to download {byte_text(plan.to_download)}: "
            "the input is no terminal, so nobody can be asked"
        )
    if not typer.confirm(f"download {byte_text(plan.to_download)}?", err=True):
        say("nothing was downloaded")
        raise typer.Exit(1)


def _plan_document(plan: FetchPlan) -> dict[str, Any]:
    return {
        "source": plan.source.name,
        "commit": plan.source.repository.commit if plan.source.repository else None,
        "folder": str(plan.folder),
        "licence": plan.source.licence,
        "bytes": plan.size,
        "bytes_to_download": plan.to_download,
        "disk_needed": plan.disk_needed,
        "disk_free": plan.disk_free,
        "files": [
            {
                "name": file.name,
                "bytes": file.size,
                "nimg": file.nimg,
                "ema_std": file.ema_std,
                "track": file.track,
                "here": file.name in plan.done,
            }
            for file in plan.files
        ],
    }


def _result_document(result: FetchResult) -> dict[str, Any]:
    return {
        "fetched": list(result.fetched),
        "kept": list(result.kept),
        "outputs": [str(path) for path in result.outputs],
    }
