"""What a conversion will write, decided and checked before the first byte is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from merge_rl.errors import CheckpointError, ConfigError, IncompatibleCheckpointError
from merge_rl.storage.checkpoints import (
    CONFIG_KEY,
    MANIFEST_NAME,
    CheckpointEntry,
    KnownSet,
    Manifest,
    SetDefaults,
    by_progress,
    has_manifest,
    licence_beside,
    load_catalogue,
    read_manifest,
    relative_inside,
    require_network,
)
from merge_rl.storage.convert.adapters import require_one_kind
from merge_rl.storage.convert.contents import (
    NO_HINTS,
    Extracted,
    Hints,
    infos_of,
    plain,
    require_same,
    shapes_of,
)
from merge_rl.storage.convert.edm2 import ASSUMED, DEFAULTS, edm2_config_from_shapes
from merge_rl.storage.convert.layouts import told_apart
from merge_rl.storage.convert.sources import extract, files_of, fingerprint
from merge_rl.storage.convert.trajectories import require_one_width
from merge_rl.storage.files import TensorInfo, read_header

ORIGIN_KEY: Final = "converted_from"  # of an output's metadata

# Options that a network of the same weights may be built with or without.
_FREE: Final = frozenset({"use_fp16", "dropout", "class_dropout_prob"})


@dataclass(frozen=True, eq=False)
class ConversionFile:
    """One output file: what goes into it."""

    found: Extracted
    file: str  # relative to the folder
    metadata: Mapping[str, str]
    licence: str | None


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """All outputs of a conversion, and the manifest they belong to."""

    folder: Path
    jobs: tuple[ConversionFile, ...]
    base: Manifest  # of what is in the folder already, or an empty one
    assumed: tuple[str, ...] = ()  # of the network, in sentences
    notes: tuple[str, ...] = ()  # what else the user should hear of
    existing: Mapping[str, CheckpointEntry] = field(default_factory=dict)

    def recorded(self, job: ConversionFile) -> str | None:
        """The hash that the folder's manifest has for this output."""
        entry = self.existing.get(job.file)
        return entry.sha256 if entry else None

    def manifest(self, hashes: Mapping[ConversionFile, str]) -> Manifest:
        """The manifest once these outputs, and their hashes, are there.

        Their order is that of a set, else that of the plan: not that in which they came to be
        there, over conversions that were cut short.
        """
        made = {job.file: self._entry(job, hashes[job]) for job in self.jobs if job in hashes}
        planned = iter(made.values())
        kept = [next(planned) if name in made else own for name, own in self.existing.items()]
        return replace(self.base, checkpoints=by_progress((*kept, *planned)))

    def _entry(self, job: ConversionFile, sha256: str) -> CheckpointEntry:
        found = job.found
        return CheckpointEntry(
            file=job.file,
            nimg=found.nimg,
            ema_std=found.ema_std,
            ema_gamma=found.ema_gamma,
            ema_start=found.ema_start,
            track=found.track,
            sha256=sha256,
            source=found.path.name,
            licence=job.licence if job.licence != self.base.licence else None,
        )


def make_plan(
    paths: Sequence[Path],
    folder: Path,
    weights: str,
    *,
    name: str | None = None,
    licence: str | None = None,
    hints: Hints = NO_HINTS,
) -> ConversionPlan:
    """Read what the sources hold, and settle outputs, network and manifest.

    Raises CheckpointError for sources that cannot be read as data, IncompatibleCheckpointError for
    different networks, also than the one whose checkpoints are in the folder already.
    """
    existing = _existing(folder)
    found = told_apart([i for path in paths for i in extract(path, weights, hints)], weights)
    if not found:
        raise CheckpointError(f"{paths[0]}: {_none_text(paths[0], weights)}")
    require_one_kind(found, hints)
    require_one_width(found, hints)
    _require_one_network(found, folder, existing)
    config, assumed = _network(found, existing, folder)
    told = hints.num_classes not in (None, config.get("label_dim")) or hints.null_class is not None
    if config.get("model") == "edm2" and told:
        raise ConfigError("an EDM2 network says its classes itself; expected no word of them")
    require_network(infos_of(found[0].tensors), config, str(found[0].path))
    known = {path: _known_files().get(path.name) for path in paths}
    origins = {path: fingerprint(path) for path in paths}
    jobs = tuple(
        ConversionFile(
            found=item,
            file=_file_name(item, folder),
            metadata=_metadata(item, config, origins[item.path]),
            licence=licence
            or item.licence
            or licence_beside(item.path)
            or _of(known[item.path], "licence"),
        )
        for item in found
    )
    _require_distinct(jobs)
    base = existing or Manifest(
        model=config,
        checkpoints=(),
        name=_common(_of(known[path], "name") for path in paths),
        licence=_common(job.licence for job in jobs),
        defaults=SetDefaults(
            autoencoder=_common(item.autoencoder for item in found),
            sampler=dict(found[0].sampler) if len({i.sampler for i in found}) == 1 else {},
        ),
    )
    return ConversionPlan(
        folder=folder,
        jobs=jobs,
        base=replace(base, name=name or base.name),
        assumed=assumed,
        notes=_notes((item.path.name, text) for item in found for text in item.notes),
        existing={entry.file: entry for entry in existing.checkpoints} if existing else {},
    )


def _none_text(path: Path, weights: str) -> str:
    if weights != "auto":
        return f"holds no {weights!r} weights; see --weights"
    home = f"{path.parent.name}_ema"  # of diffusers' networks
    return f"raw weights, whose average lies beside them in {home}; name that, or --weights model"


def _existing(folder: Path) -> Manifest | None:
    file = folder / MANIFEST_NAME
    if not file.exists():
        return None
    if not has_manifest(folder):
        raise CheckpointError(f"{file}: a catalogue of known sets; choose another folder")
    return read_manifest(file)


def _require_one_network(
    found: Sequence[Extracted], folder: Path, existing: Manifest | None
) -> None:
    expected: Mapping[str, TensorInfo]
    expected, name = infos_of(found[0].tensors), found[0].path.name
    for entry in existing.checkpoints if existing else ():
        try:
            expected, name = read_header(folder / entry.file).tensors, entry.file
            break
        except CheckpointError:
            continue  # missing or damaged: perhaps it is to be made again
    for item in found:
        require_same(item, expected, name)


def _network(
    found: Sequence[Extracted], existing: Manifest | None, folder: Path
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """(config of all the files, what was assumed to get it).

    The config is that of the folder, else what a file states, else what the shapes say.
    """
    # The file that leaves least to assume describes the network; it overrides the others.
    told = sorted((i for i in found if i.config is not None), key=lambda item: len(item.assumed))
    notes: tuple[str, ...] = ()
    if existing is not None:
        first, config = str(folder / MANIFEST_NAME), existing.model
    elif told:
        first, config = str(told[0].path), told[0].config or {}
        same = [(item, text) for text in told[0].assumed.values() for item in told]
        notes = _notes((i.path.name, text) for i, text in same if text in i.assumed.values())
    else:
        path = found[0].path
        try:
            inferred = edm2_config_from_shapes(shapes_of(found[0].tensors))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        return inferred, (f"{path.name} does not say its network's options; taken: {ASSUMED}",)
    for item in told:
        other = {k: v for k, v in (item.config or {}).items() if k not in item.assumed}
        known = {k: v for k, v in config.items() if k not in item.assumed}
        _require_same_config(str(item.path), other, first, known)
    return config, notes


def _notes(said: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """One line for each text, with the first file that it is said of."""
    files: dict[str, dict[str, None]] = {}
    for name, text in said:
        files.setdefault(text, {})[name] = None
    return tuple(
        f"{next(iter(names))}{f' and {len(names) - 1} more' * (len(names) > 1)}: {text}"
        for text, names in files.items()
    )


def _require_same_config(
    where: str, config: Mapping[str, Any], first: str, expected: Mapping[str, Any]
) -> None:
    default = DEFAULTS if "edm2" == expected.get("model") == config.get("model") else {}
    found, wanted = {**default, **config}, {**default, **expected}
    for key in sorted((found.keys() | wanted.keys()) - _FREE):
        if plain(found.get(key)) != plain(wanted.get(key)):
            raise IncompatibleCheckpointError(
                f"{where}: a network with {key} {plain(found.get(key))}, expected"
                f" {plain(wanted.get(key))} as in {first}; convert different networks into"
                " different folders"
            )


def _file_name(found: Extracted, folder: Path) -> str:
    if found.stem.startswith("."):
        raise CheckpointError(f"{found.path}: a hidden file's name is none for a checkpoint")
    name = str(PurePosixPath(found.folder) / f"{found.stem}.safetensors")
    return relative_inside(folder, name, str(found.path))


def _metadata(found: Extracted, config: Mapping[str, Any], samples: str) -> dict[str, str]:
    """What an output says of itself; all but text as JSON."""
    size = sum(part.stat().st_size for part in files_of(found.path))
    origin = {"name": found.path.name, "bytes": size, "samples": samples}
    facts = {
        CONFIG_KEY: dict(config) or None,
        ORIGIN_KEY: {**origin, "track": found.track},
        "nimg": found.nimg,
        "ema_std": found.ema_std,
        "ema_gamma": found.ema_gamma,
        "ema_start": found.ema_start,
        **found.facts,
    }
    return {
        key: json.dumps(value, sort_keys=True) for key, value in facts.items() if value is not None
    }


def _require_distinct(jobs: Sequence[ConversionFile]) -> None:
    # Some file systems do not tell capitals from small letters.
    homes: dict[str, ConversionFile] = {}
    for job in jobs:
        other = homes.setdefault(job.file.casefold(), job)
        if other is not job:
            raise CheckpointError(
                f"{other.found.path} and {job.found.path} would both be written to {job.file}"
            )


@cache
def _known_files() -> Mapping[str, KnownSet]:
    return {file: known for known in load_catalogue().sets for file in known.file_names()}


def _of(known: KnownSet | None, key: Literal["name", "licence"]) -> str | None:
    return None if known is None else str(getattr(known, key))


def _common(values: Iterable[str | None]) -> str | None:
    """The value, if there is one and the same for all."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None
