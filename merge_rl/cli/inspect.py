"""`mergerl inspect`: what a folder or file is, and whether it is sound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from merge_rl.cli.output import JsonFlag, note, note_all, print_json, tell
from merge_rl.cli.results import interval_text
from merge_rl.cli.tables import print_table
from merge_rl.errors import CheckpointError, IncompatibleCheckpointError, quoted
from merge_rl.own_code import allow_network
from merge_rl.progress import counted

if TYPE_CHECKING:
    from merge_rl.config import OptimizeConfig
    from merge_rl.storage.checkpoints import CheckpointEntry, CheckpointSet


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(inspect)


def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Set, run, reference, model, or user/repo.")
    ],
    track: Annotated[str | None, typer.Option(help="Series of the manifest to look at.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Read headers only, no weights.")] = False,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Your own, package.module:factory.", show_default="as files say"
        ),
    ] = None,
    json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Say what a checkpoint set, run, reference or model is, and check it.

    Reads every weight of a set and compares hashes, unless --quick. Exits with 1 if a check fails.
    """
    from merge_rl.registry import build_on_meta
    from merge_rl.storage.files import index_of, reference_file
    from merge_rl.storage.runs import find_set, folder_kind, only_inside

    if network is not None:  # where its code fails, no checkpoint is at fault
        build_on_meta({"model": allow_network(network)})
    if not reference_file(path)[0].exists():
        path = _fetched(path)
    place = only_inside(path) if path.is_dir() else index_of(path) or path
    kind = folder_kind(place) if place.is_dir() else "file"
    if place != path:
        note(f"{path}: took the {kind} {place}")
    if kind == "run":
        _show_run(place, json=json)
    elif _holds_statistics(place):
        _show_references(place, json=json)
    elif kind in ("file", "model"):
        _show_file(place, network=network, json=json)
    else:
        _show_set(find_set(place).path, track=track, quick=quick, network=network, json=json)


def _fetched(path: Path) -> Path:
    """The set or model of the Hub that is named."""
    from merge_rl.cli.options import meant, meant_set, named
    from merge_rl.storage.hub import is_set_of_hub

    return meant_set(path) if is_set_of_hub(named(path)) else meant(path)


def _show_set(
    path: Path, *, track: str | None, quick: bool, network: str | None, json: bool
) -> None:
    from merge_rl.storage.checkpoints import open_checkpoints, require_network

    opened = open_checkpoints(path, track=track, distinct=False)  # every file is checked
    if network is not None:
        from merge_rl.workflows.assembly import with_network

        with_network(opened, network)
    checks = [] if quick else list(opened.verify())
    failed = {check.name: str(check.error) for check in checks if not check.ok}
    try:
        require_network(opened.tensors, opened.config, str(path))
    except IncompatibleCheckpointError as error:  # of the set: all have the same tensors
        failed = {name: failed.get(name, str(error)) for name in opened.names}
    if json:
        print_json(_set_document(opened, failed))
    else:
        note_all(opened.notes)
        status = dict.fromkeys((check.name for check in checks), "ok")
        status |= dict.fromkeys(failed, "FAILED")
        rows = [
            [
                name,
                entry.track or "-",
                f"{entry.nimg:,}" if entry.nimg is not None else "-",
                _width(entry),
                status.get(name, "not read"),
            ]
            for name, entry in zip(opened.names, opened.entries, strict=True)
        ]
        count = sum(math.prod(info.shape) for info in opened.tensors.values())
        shapes = {key: info.shape for key, info in opened.tensors.items()}
        model = _network_name(opened.config, shapes) or "unknown network"
        title = (
            f"{counted(len(opened), 'checkpoint')} of {model}, {count:,} values in "
            f"{len(opened.tensors)} tensors each, {opened.total_bytes / 1e6:.1f} MB, "
            f"licence {opened.licence or 'not stated'}"
        )
        print_table(title, ["checkpoint", "track", "nimg", "ema_std", "check"], rows)
    if failed:
        raise CheckpointError(
            f"{len(failed)} of {len(opened)} checkpoints are not sound; "
            f"first: {next(iter(failed.values()))}"
        )


_OF_ENTRIES: Final = ("track", "nimg", "ema_std", "ema_gamma", "ema_start")


def _set_document(opened: CheckpointSet, failed: dict[str, str]) -> dict[str, Any]:
    newest = opened.names[opened.newest]
    return {
        "kind": "checkpoint set",
        "folder": str(opened.folder),
        "network": _network_name(
            opened.config, {key: info.shape for key, info in opened.tensors.items()}
        ),
        "model": opened.config,
        "licence": opened.licence,
        "bytes": opened.total_bytes,
        "tracks": opened.tracks,
        "newest": opened.duplicates.get(newest, newest),
        "duplicates": dict(opened.duplicates),
        "checkpoints": [
            {
                "name": name,
                **{key: getattr(entry, key) for key in _OF_ENTRIES},
                "error": failed.get(name),
            }
            for name, entry in zip(opened.names, opened.entries, strict=True)
        ],
    }


def _show_run(path: Path, *, json: bool) -> None:
    from merge_rl.storage.runs import RunDir, fitting

    run = RunDir.open(path)
    config, events, result = run.config(), run.events(), run.read("result.json")
    with fitting(path, "events.jsonl or result.json"):
        document = _run_document(config, events, result)
        if json:
            print_json(document)
        else:
            _print_run(path, document)


def _run_document(
    config: OptimizeConfig, events: Sequence[Mapping[str, Any]], result: Mapping[str, Any] | None
) -> dict[str, Any]:
    last = events[-1] if events else None
    return {
        "kind": "run",
        "state": "finished" if result else "unfinished",
        "checkpoints": config.checkpoints,
        "budget": config.budget,
        "seed": config.seed,
        "rounds": len(events),
        "images": (result or {}).get("search_images", last["images"] if last else 0),
        "pool_fid": last["pool_after"] if last else None,
        "comparison": result.get("comparison") if result else None,
    }


def _print_run(path: Path, document: Mapping[str, Any]) -> None:
    rows = [[key, _shown(value)] for key, value in document.items() if key != "comparison"]
    print_table(str(path), ["run", ""], rows)
    if document["state"] == "unfinished":
        tell(f"go on with: mergerl resume {quoted(path)}")
    if (comparison := document["comparison"]) is None:  # not there yet, or one that is compared
        return
    headline, entries = comparison["headline"], comparison["entries"]
    print_table(
        f"{headline} FID, N = {comparison['num_images']:,}",
        ["model", "mean [95 % interval]"],
        [[name, interval_text(summary[headline])] for name, summary in entries.items()],
    )


def _shown(value: object) -> str:
    """Plain data as people write it."""
    if isinstance(value, Mapping):
        value = [f"{key} {part}" for key, part in value.items()]
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else shown


def _show_file(path: Path, *, network: str | None, json: bool) -> None:
    from merge_rl.storage.checkpoints import check_model_file, left_in_file, require_network
    from merge_rl.storage.files import left_out, weights_in

    tensors, stated = check_model_file(path)
    config = stated if network is None else {"model": network}
    beside = left_out(path, weights_in(path)) if path.is_dir() else []
    note_all([*filter(None, [left_in_file(path)]), *beside])
    document: dict[str, Any] = {
        "kind": "model",
        "network": _network_name(config, {key: info.shape for key, info in tensors.items()}),
        "tensors": len(tensors),
        "values": sum(math.prod(info.shape) for info in tensors.values()),
        "dtypes": sorted({info.type_name for info in tensors.values()}),
        "config": config,
    }
    if json:
        print_json(document)
    else:
        rows = [[k, _shown(value)] for k, value in document.items() if value is not None]
        print_table(str(path), ["file", ""], rows, words=True)
    require_network(tensors, config, str(path))


def _holds_statistics(path: Path) -> bool:
    if path.is_dir():
        return False
    from merge_rl.storage.files import is_weights_name
    from merge_rl.storage.runs import holds_weights

    if path.is_file() and is_weights_name(path.name) and holds_weights(path):
        return False
    from merge_rl.workflows.reference import kind_of

    return path.suffix.lower() == ".pkl" or kind_of(path) in ("reference", "features")


def _show_references(path: Path, *, json: bool) -> None:
    from merge_rl.workflows.reference import load_all_references

    documents = []
    for entry, found in load_all_references(path).items():
        documents.append(
            {
                "kind": "reference",
                "entry": entry or None,
                "extractor": found.extractor or None,
                "extractor_sha256": found.extractor_sha256,
                "preprocessing": found.preprocessing or None,
                "dimensions": found.dim,
                "count": found.count,
                "resolution": found.resolution,
                "features": None if found.features is None else len(found.features),
                "labels": found.labels is not None,
                "source": found.source or None,
                "note": found.assumed or None,
            }
        )
    if json:
        print_json(documents[0] if len(documents) == 1 else {"entries": documents})
        return
    for document in documents:
        rows = [[key, str(value)] for key, value in document.items() if value is not None]
        print_table(str(path), ["statistics", ""], rows)


def _network_name(
    config: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]]
) -> str | None:
    """The family, with the published size where there is one: "edm2", "SiT-XL/2", "sit (custom)".

    Where no config is known, tensors may still tell which families they fit: "sit or dit".
    """
    from merge_rl.storage.convert import families_of, sit_size_name

    if config is None or "model" not in config:
        return " or ".join(families_of(shapes)) or None
    family = str(config["model"])
    title = {"sit": "SiT", "dit": "DiT", "repa": "REPA"}.get(family)
    size = sit_size_name(config) if title else "custom"
    if size != "custom":
        return size.replace("SiT", title or family)
    return f"{family} (custom)" if title else family


def _width(entry: CheckpointEntry) -> str:
    said = width_text(entry.ema_std, entry.ema_gamma)
    return said or ("raw" if entry.track in (None, "raw") else "-")


def width_text(ema_std: float | None, ema_gamma: float | None) -> str | None:
    """An average's width as tables show it, or the exponent of one wider than any."""
    if ema_std is not None:
        return f"{ema_std:.3f}"
    return None if ema_gamma is None else f"exponent {ema_gamma:.3f}"
