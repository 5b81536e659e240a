"""What a file to convert is, and the weights in it: the one place that knows all kinds."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from merge_rl.errors import CheckpointError, ConfigError
from merge_rl.storage.checkpoints import has_manifest, metadata_config
from merge_rl.storage.convert import edm2 as edm2_source
from merge_rl.storage.convert.contents import NO_HINTS, Extracted, Hints, require_size, state_dict
from merge_rl.storage.convert.library import read_library
from merge_rl.storage.convert.states import holds_states, read_states
from merge_rl.storage.files import (
    INDEX_SUFFIX,
    is_weights_name,
    natural_key,
    network_name,
    open_weights,
    parse_index,
    weights_in,
)
from merge_rl.storage.pickles import (
    ByteSource,
    Span,
    StorageRef,
    TensorRef,
    kind_of,
    read_data,
    row_major,
    shown,
)

SUFFIXES: Final = (".pkl", ".pt", ".pth")
_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 4096


def list_files(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> tuple[list[Path], list[str]]:
    """The files that are meant: themselves, or those of a folder by their endings; each once.

    Beside them a sentence for each other name of a file among them, a link to it.
    Of a folder with snapshots (.pkl), training states are left out: they are several times larger
    and of another type, so that both cannot form one set.
    """
    given = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    names: dict[Path, list[Path]] = {}
    for item in map(Path, given):
        if item.is_dir():
            within = _convertible(item) or weights_in(item)
            if not within and has_manifest(item):
                raise CheckpointError(f"{item}: a set of .safetensors already, nothing to convert")
            if not within:
                raise CheckpointError(f"{item}: holds no .pkl or .pt files to convert")
        elif item.is_file():
            within = [item]
        else:
            raise CheckpointError(f"{item}: no such file or folder")
        for file in within:
            names.setdefault(file.resolve(), []).append(file)
    if not names:
        raise ConfigError("expected at least one file or folder to convert, got none")
    # A link is another name for its file: the file's own counts.
    files = [min(alike, key=Path.is_symlink) for alike in names.values()]
    repeated = [
        f"{other} and {kept} are the same file and count once, as {kept.name}"
        for kept, alike in zip(files, names.values(), strict=True)
        for other in dict.fromkeys(alike)
        if other != kept
    ]
    return files, repeated


def _convertible(folder: Path) -> list[Path]:
    found = (
        file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()
    )
    files = sorted(found, key=lambda file: natural_key(file.name))
    states = [file for file in files if file.name.startswith("training-state-")]
    snapshots = any(file.suffix.lower() == ".pkl" for file in files)
    return [file for file in files if file not in states] if snapshots else files


def extract(path: Path, weights: str = "auto", hints: Hints = NO_HINTS) -> list[Extracted]:
    """The weights in a file, one result a track; CheckpointError if it is of no known kind."""
    if is_weights_name(path.name):
        found = _read_safetensors(path, weights, hints)
    else:
        found = _read_pickled(path, weights, hints)
    for item in found:
        require_size(item, sum(part.stat().st_size for part in files_of(path)))
    return found


def files_of(path: Path) -> list[Path]:
    """The files that a source consists of: itself, and the shards of an index."""
    shards = parse_index(path).values() if path.name.endswith(INDEX_SUFFIX) else ()
    return [path, *sorted(set(shards))]


def fingerprint(path: Path) -> str:
    """SHA-256 of each file's size and of 64 samples of 4 KiB, evenly spaced from start to end.

    Tells apart files of the same name and size without reading gigabytes; no proof of equality.
    """
    digest = hashlib.sha256()
    for source in map(ByteSource, files_of(path)):
        digest.update(source.size.to_bytes(8, "little"))
        length = min(_SAMPLE_BYTES, source.size)
        for i in range(_SAMPLES):
            digest.update(source.read((source.size - length) * i // (_SAMPLES - 1), length))
    return digest.hexdigest()


def _read_pickled(path: Path, weights: str, hints: Hints) -> list[Extracted]:
    data = read_data(path)
    if not isinstance(data, dict):
        raise _unknown(path, kind_of(data))
    if edm2_source.is_snapshot(data):
        if weights == "model":
            raise CheckpointError(f"{path}: a network snapshot holds an EMA, no raw weights")
        return [edm2_source.read_snapshot(data, path)]
    if edm2_source.is_training_state(data):
        return edm2_source.read_training_state(data, path, weights)
    if holds_states(data):
        return read_states(data, path, weights, hints)
    keys = [shown(key, 30) for key in data if isinstance(key, str)][:8]
    raise _unknown(path, f"a mapping with the keys {', '.join(keys) or '(none)'}")


def _unknown(path: Path, found: str) -> CheckpointError:
    expected = "an EDM2 snapshot or training state, or weights of SiT, DiT, REPA or JiT"
    return CheckpointError(f"{path}: expected {expected}, found {found}")


def _read_safetensors(path: Path, weights: str, hints: Hints) -> list[Extracted]:
    """Weights that have the right form already, be it in shards; what they say of themselves."""
    stored = open_weights(path)
    sources = {file: ByteSource(file) for file in stored.parts}
    tensors = {}
    for name, info in stored.tensors.items():
        home = stored.homes[name]
        span = Span(sources[home], stored.parts[home].begins[name], info.nbytes)
        storage = StorageRef(info.code, math.prod(info.shape), span)
        tensors[name] = TensorRef(storage, 0, info.shape, tuple(row_major(info.shape)))
    config = metadata_config(path, stored.metadata)
    named = state_dict(tensors, str(path))
    library = read_library(path, named, weights, hints) if config is None else None
    if library is not None:
        return library
    found = read_states(named, path, weights, hints, config)
    return [replace(item, stem=network_name(path)) for item in found]
