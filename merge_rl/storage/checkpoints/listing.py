"""Which files of a folder form a checkpoint set, in which order, and where a model comes from."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from merge_rl.errors import CheckpointError, IncompatibleCheckpointError, UnknownNameError, absent
from merge_rl.storage.checkpoints.catalogue import load_catalogue
from merge_rl.storage.checkpoints.diffusers_folder import is_network_config, network_config
from merge_rl.storage.checkpoints.manifest import (
    MANIFEST_NAME,
    CheckpointEntry,
    Manifest,
    has_manifest,
    parse_stem,
    read_manifest,
)
from merge_rl.storage.checkpoints.model_file import (
    folder_config,
    library_document,
    metadata_config,
    model_file_path,
    named_as_network,
    open_model_file,
)
from merge_rl.storage.checkpoints.recorded import find_listing, with_records
from merge_rl.storage.files import (
    StoredWeights,
    absolute,
    averaged,
    in_training_order,
    instead_of_weights,
    network_name,
    open_weights,
    spellings,
    weights_in,
    weights_stem,
    with_thousands,
    without_numbers,
)


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Files of a folder in the order of the set; `names` are unique."""

    folder: Path
    manifest: Manifest | None
    entries: tuple[CheckpointEntry, ...]
    names: tuple[str, ...]

    def path(self, index: int) -> Path:
        """Where a checkpoint lies."""
        return self.folder / self.entries[index].file


def list_folder(folder: Path) -> Listing:
    """All checkpoints of a folder: those of its manifest, or its `.safetensors` files."""
    if not folder.exists():
        raise CheckpointError(f"{absent(folder, 'folder', of_hub=True)}{_published(folder)}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder of checkpoints, found a file")
    if os.path.lexists(folder / MANIFEST_NAME):
        manifest = read_manifest(folder)
        entries = by_progress(manifest.checkpoints)
    else:
        manifest, entries = None, _entries_by_name(folder)
        recorded = with_records(folder, entries)
        entries = entries if recorded == entries else by_progress(recorded)
    names = _unique_names(entries)
    return Listing(folder=folder, manifest=manifest, entries=entries, names=names)


def _published(folder: Path) -> str:
    """What to run where a name is that of a published set, or of the form user/repo."""
    named = str(folder) in load_catalogue().names
    of_hub = len(folder.parts) == 2 and not folder.is_absolute() and not folder.parent.exists()
    return f"; `mergerl fetch {folder} DIR` gets it, if it is published" if named or of_hub else ""


def select_entries(listing: Listing, *, track: str | None, select: Sequence[str] | None) -> Listing:
    """The part of a listing in one track, with the given names; the order stays."""
    keep = list(range(len(listing.entries)))
    if track is not None:
        known = {entry.track for entry in listing.entries if entry.track}
        if track not in known:
            raise UnknownNameError("track", track, known)
        keep = [i for i in keep if listing.entries[i].track == track]
    if select is not None:
        known = {listing.names[i] for i in keep}
        for name in select:
            if name not in known:
                raise UnknownNameError("checkpoint", name, known)
        keep = [i for i in keep if listing.names[i] in set(select)]
    if not keep:
        raise CheckpointError(f"{listing.folder}: the selection of checkpoints is empty")
    return replace(
        listing,
        entries=tuple(listing.entries[i] for i in keep),
        names=tuple(listing.names[i] for i in keep),
    )


def read_headers(listing: Listing) -> tuple[list[StoredWeights], dict[str, Any] | None]:
    """What all files hold, each in agreement with the first, and the config of their network."""
    paths = [listing.folder / entry.file for entry in listing.entries]
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path}: listed in {MANIFEST_NAME}, but there is no such file")
    headers = [open_weights(path) for path in paths]
    if not headers[0].tensors:
        raise CheckpointError(f"{paths[0]}: holds no tensors")
    config = set_config(listing, headers[0])
    headers = named_alike(headers, config)
    for path, header in zip(paths[1:], headers[1:], strict=True):
        require_same(path, header, paths[0], headers[0])
    return headers, config


def named_alike(
    headers: Sequence[StoredWeights], config: Mapping[str, Any] | None
) -> list[StoredWeights]:
    """Under the names of the network of `config`, which is asked once about equal tensors."""
    known: dict[frozenset[str], Mapping[str, str]] = {}
    for header in headers:
        if (names := frozenset(header.tensors)) not in known:
            made = named_as_network(header, config)
            known[names] = {} if made is header else made.in_files
    found = ((header, known[frozenset(header.tensors)]) for header in headers)
    return [header.renamed(names) if names else header for header, names in found]


def require_same(path: Path, header: StoredWeights, first_path: Path, first: StoredWeights) -> None:
    """Refuse a file whose tensors differ from the first file's, naming the first difference."""
    names = list(dict.fromkeys([*first.tensors, *header.tensors]))
    differing = [name for name in names if header.tensors.get(name) != first.tensors.get(name)]
    if differing:
        found = header.tensors.get(differing[0], "missing")
        expected = first.tensors.get(differing[0], "no such tensor")
        more = f"; {len(differing) - 1} more tensors differ" if len(differing) > 1 else ""
        raise IncompatibleCheckpointError(
            f"{path}: tensor {differing[0]!r} is {found}, "
            f"expected {expected} as in {first_path.name}{more}"
        )


def set_config(listing: Listing, first: StoredWeights) -> dict[str, Any] | None:
    """Model config: the manifest's, else the folder's `config.json`, else the first file's own.

    Else that of a manifest further up that lists the first file.
    """
    if listing.manifest is not None:
        return dict(listing.manifest.model) or None
    config = folder_config(listing.folder)
    if config is None:
        config = metadata_config(listing.path(0), first.metadata)
    if config is None:
        config = folder_config(listing.path(0).parent)
    if config is None and (listed := find_listing(listing.path(0))):
        config = dict(listed[0].model)
    return config or None


def _entries_by_name(folder: Path) -> tuple[CheckpointEntry, ...]:
    files = weights_in(folder)
    if not files:
        raise CheckpointError(f"{folder}: no .safetensors files{instead_of_weights(folder)}")
    if any((file.parent / "adapter_config.json").is_file() for file in files):
        how = "as factors or as products (--adapters)"
        raise CheckpointError(f"{folder}: adapters; `mergerl convert` makes a set of them, {how}")
    names = [file.relative_to(folder) for file in files]
    several = len({averaged(name) for name in names}) > 1
    progress = [parse_stem(network_name(name)) for name in names]
    return tuple(
        CheckpointEntry(
            file=name.as_posix(), nimg=nimg, ema_std=ema_std,
            track=("ema" if averaged(name) else "raw") if several else None,
        )
        for name, (nimg, ema_std) in zip(names, progress, strict=True)
    )  # fmt: skip


def by_progress(entries: tuple[CheckpointEntry, ...]) -> tuple[CheckpointEntry, ...]:
    """In the order of a set: by training, else by the numbers of names; else as they are."""
    if any(entry.nimg is None for entry in entries):
        return _by_numbers(entries)
    return tuple(sorted(entries, key=progress))


def progress(entry: CheckpointEntry) -> tuple[int, float, float]:
    """What checkpoints are sorted by: (nimg, ema_std, exponent of those wider than any)."""
    return entry.nimg or 0, entry.ema_std or 0.0, entry.ema_gamma or 0.0


def _by_numbers(entries: tuple[CheckpointEntry, ...]) -> tuple[CheckpointEntry, ...]:
    """Names that differ in numbers alone are a series: by those, else the order of the manifest."""
    stems = [weights_stem(PurePosixPath(entry.file).name) for entry in entries]
    if len({without_numbers(stem) for stem in with_thousands(stems).values()}) > 1:
        return entries
    return tuple(in_training_order(entries, lambda entry: PurePosixPath(entry.file).stem))


def _unique_names(entries: Sequence[CheckpointEntry]) -> tuple[str, ...]:
    """File stems; with their folder where a stem occurs twice (raw/a and ema/a).

    Files of one name in folders of their own are called by those; a file beside shards of the same
    name by its whole name.
    """
    paths = [PurePosixPath(entry.file) for entry in entries]
    names = [network_name(path) for path in paths]
    for longer in (_long_name, str):
        count = Counter(names)
        names = [
            name if count[name] == 1 else longer(path)
            for path, name in zip(paths, names, strict=True)
        ]
    return tuple(names)


def _long_name(path: PurePosixPath) -> str:
    stem = weights_stem(path.name)
    return str(path.with_name(stem) if network_name(path) == stem else path.parent)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Name, config and provenance of a model."""

    name: str
    config: Mapping[str, Any]  # "model" and the network's constructor options
    licence: str | None = None
    source: str | None = None  # where the manifest says that it came from
    nimg: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)  # of the file


def find_origin(path: str | os.PathLike[str], network: str | None = None) -> Origin:
    """What files and manifests say of the model at `path`; `network` is code that builds it."""
    file = open_model_file(path)
    config = file.config if network is None else {"model": network}
    if config is None:
        raise unknown_config(path)
    manifest, entry = _listing(Path(path)) or (_nearest(Path(path)), None)
    return Origin(
        name=(manifest.name if manifest else None) or absolute(path).stem,
        config=config,
        licence=(entry.licence if entry else None) or (manifest.licence if manifest else None),
        source=entry.source if entry else None,
        nimg=entry.nimg if entry else None,
        metadata=file.metadata,
    )


def unknown_config(path: str | os.PathLike[str]) -> CheckpointError:
    """What to raise where nothing says of which network the weights of a folder or file are."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    document = library_document(folder)
    why = f"{path}: the model config is not known; expected a config.json or a manifest"
    if document is not None and is_network_config(document):
        try:
            network_config(document, folder)
        except CheckpointError as error:
            why = str(error)
    return CheckpointError(f"{why}, or --network package.module:factory")


def newest_model(path: str | os.PathLike[str], track: str | None = None) -> Path:
    """`path` itself, or the newest checkpoint of the set that it is the folder of.

    "Newest" is the largest (nimg, ema_std), the last one of those equal.
    """
    folder = Path(path)
    several = folder.is_dir() and (has_manifest(folder) or len(weights_in(folder)) > 1)
    if not several:
        if track is not None:
            raise CheckpointError(f"{path}: a track is a series of a set; expected its folder")
        return folder
    opened = select_entries(list_folder(folder), track=track, select=None)
    return opened.path(-1)


def _nearest(path: Path) -> Manifest | None:
    """The manifest of the set or run that a model lies in without being one of its files."""
    for place in spellings(path):
        for folder in list(place.parents)[:2]:
            if has_manifest(folder):
                return read_manifest(folder)
    return None


def _listing(path: Path) -> tuple[Manifest, CheckpointEntry] | None:
    try:
        return find_listing(model_file_path(path))
    except CheckpointError:  # shards, which no manifest lists
        return None
