"""`checkpoints_manifest.yaml`: what the files of a folder are, and where they came from.

A manifest comes with files from anywhere, so it is checked in full: plain data only, no name that
leads out of its folder, one sentence for whatever does not fit.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final

from merge_rl.config import nimg_from_kimg
from merge_rl.errors import ConfigError, ManifestError
from merge_rl.storage.files import Fields, write_yaml
from merge_rl.untrusted import load_yaml, read_bounded

MANIFEST_NAME: Final = "checkpoints_manifest.yaml"
MANIFEST_VERSION: Final = 1
MAX_NAME_BYTES: Final = 255  # that file systems take

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_NAME = re.compile(r"[a-z0-9_-]+")
_CATALOGUE = re.compile(r"^sets:", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class CheckpointEntry:
    """One checkpoint file and its provenance."""

    file: str  # relative to the folder, forward slashes
    nimg: int | None = None  # training images seen
    ema_std: float | None = None  # relative EMA width; None for raw weights
    ema_gamma: float | None = None  # exponent of an average wider than any ema_std says
    ema_start: float | None = None  # images at which the average began as a copy of the weights
    track: str | None = None  # the series the file belongs to
    sha256: str | None = None  # 64 hexadecimal digits, lower case
    source: str | None = None
    licence: str | None = None  # overrides the set's


@dataclass(frozen=True, kw_only=True)
class SetDefaults:
    """What an optimization uses when nothing is said; paths relative to the folder."""

    extractor: str | None = None
    extractor_weights: Path | None = None
    reference: Path | None = None
    heldout: Path | None = None
    autoencoder: str | None = None
    autoencoder_weights: Path | None = None
    sampler: Mapping[str, Any] = field(default_factory=dict)

    def resolved(self, folder: Path) -> SetDefaults:
        """The same with every path under `folder`."""
        paths = {key: getattr(self, key) for key in _DEFAULT_PATHS}
        sampler = dict(self.sampler)
        if isinstance(sampler.get("guide"), str):
            where = f"{folder / MANIFEST_NAME}, defaults.sampler.guide"
            sampler["guide"] = str(folder / relative_name(sampler["guide"], where))
        found = {key: folder / path for key, path in paths.items() if path}
        return replace(self, sampler=sampler, **found)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A checked manifest."""

    model: Mapping[str, Any]  # {"model": name, constructor options...}, {} of an unknown network
    checkpoints: tuple[CheckpointEntry, ...]
    name: str | None = None
    licence: str | None = None
    defaults: SetDefaults = SetDefaults()


_DEFAULT_PATHS: Final = ("extractor_weights", "reference", "heldout", "autoencoder_weights")
_ENTRY_OPTIONS: Final = [item.name for item in fields(CheckpointEntry) if item.name != "file"]


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Manifest at `path`, a file or the folder that holds one; ManifestError if malformed.

    The files it names need not exist.
    """
    file = Path(path)
    file = file / MANIFEST_NAME if file.is_dir() else file
    return _parse(load_yaml(file), file)


def write_manifest(path: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write a manifest atomically, after the checks that reading makes."""
    document = _document(manifest)
    _parse(document, Path(path))
    write_yaml(path, document)


def has_manifest(folder: Path) -> bool:
    """Whether a folder has a manifest of its own.

    A catalogue of known sets goes by the same file name; it lists no file of its folder.
    """
    file = folder / MANIFEST_NAME
    return os.path.lexists(file) and not _CATALOGUE.search(read_bounded(file))


def relative_name(text: str, where: str) -> str:
    """A relative path in normal form; refused if absolute or climbing.

    Links are not looked at: what a folder links to is its owner's choice (the Hub's cache keeps
    all files elsewhere), no file's.
    """
    pure, foreign = PurePosixPath(text), PureWindowsPath(text)
    if pure.is_absolute() or foreign.drive or foreign.root:
        raise ManifestError(f"{where}: expected a path relative to the folder, found {text!r}")
    if ".." in pure.parts or "\\" in text or "\0" in text or not pure.parts:
        problem = "without '..' or backslashes"
        raise ManifestError(f"{where}: expected a path inside the folder {problem}, found {text!r}")
    if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in pure.parts):
        problem = f"of names of at most {MAX_NAME_BYTES} bytes"
        raise ManifestError(f"{where}: expected a path {problem}, found {text!r:.60}")
    return str(pure)


def relative_inside(folder: Path, text: str, where: str) -> str:
    """The same for what is to be written: refused as well if linked out of `folder`."""
    name = relative_name(text, where)
    try:
        inside = (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a link that leads to itself
        inside = False
    if not inside:
        raise ManifestError(f"{where}: {text!r} is a link that leaves the folder {folder}")
    return name


def _parse(document: object, file: Path) -> Manifest:
    where = str(file)
    if isinstance(document, dict) and "sets" in document:
        raise ManifestError(f"{where}: a catalogue of known sets, not the manifest of a folder")
    top = Fields(
        document,
        where,
        required=["version", "model", "checkpoints"],
        optional=["name", "licence", "defaults"],
    )
    if top.count("version") != MANIFEST_VERSION:
        raise top.refuse("version", str(MANIFEST_VERSION))
    model = top.mapping("model")
    if model and not isinstance(model.get("model"), str):
        raise ManifestError(f"{where}, model: expected a key 'model' that names the network")
    return Manifest(
        model=model,
        checkpoints=_parse_entries(top, file),
        name=top.text("name"),
        licence=top.text("licence"),
        defaults=_parse_defaults(top, file),
    )


def _parse_entries(top: Fields, file: Path) -> tuple[CheckpointEntry, ...]:
    values = top.entries("checkpoints")
    if not values:
        raise top.refuse("checkpoints", "at least one entry")
    entries: dict[str, CheckpointEntry] = {}
    for index, value in enumerate(values):
        where = f"{file}, checkpoints[{index}]"
        entry = _parse_entry(Fields(value, where, required=["file"], optional=_ENTRY_OPTIONS))
        if entry.file in entries:
            raise ManifestError(f"{where}, file: {entry.file!r} is listed twice")
        entries[entry.file] = entry
    return tuple(entries.values())


def _parse_entry(item: Fields) -> CheckpointEntry:
    name = relative_name(item.needed_text("file"), f"{item.where}, file")
    if not name.lower().endswith(".safetensors"):
        raise item.refuse("file", "a .safetensors file")
    ema_std = item.number("ema_std")
    if ema_std is not None and not is_ema_std(ema_std):
        raise item.refuse("ema_std", f"a width from {MIN_EMA_STD} to below {MAX_EMA_STD}")
    ema_gamma, ema_start = item.number("ema_gamma"), item.number("ema_start")
    if ema_gamma is not None and (ema_std is not None or not -1 < ema_gamma < MAX_EMA_GAMMA):
        raise item.refuse("ema_gamma", f"an exponent of -1 to {MAX_EMA_GAMMA}, without ema_std")
    if ema_start is not None and not 0 <= ema_start < math.inf:
        raise item.refuse("ema_start", "a number of images")
    sha256 = item.text("sha256")
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise item.refuse("sha256", "64 hexadecimal digits")
    return CheckpointEntry(
        file=name,
        nimg=item.count("nimg"),
        ema_std=ema_std,
        ema_gamma=ema_gamma,
        ema_start=ema_start,
        track=item.text("track"),
        sha256=sha256.lower() if sha256 else None,
        source=item.text("source"),
        licence=item.text("licence"),
    )


def _parse_defaults(top: Fields, file: Path) -> SetDefaults:
    if "defaults" not in top:
        return SetDefaults()
    known = [item.name for item in fields(SetDefaults)]
    section = Fields(top.raw("defaults"), f"{file}, defaults", required=[], optional=known)
    paths: dict[str, Any] = {}
    for key in _DEFAULT_PATHS:
        if key in section:
            where = f"{section.where}, {key}"
            paths[key] = Path(relative_name(section.needed_text(key), where))
    return SetDefaults(
        extractor=_parse_name(section, "extractor"),
        autoencoder=_parse_name(section, "autoencoder"),
        sampler=section.mapping("sampler"),
        **paths,
    )


def _parse_name(section: Fields, key: str) -> str | None:
    # "package.module:factory" is for those who own the module: files from anywhere name no code.
    name = section.text(key)
    if name is not None and not _NAME.fullmatch(name):
        raise section.refuse(key, f"the name of a registered {key}")
    return name


def _document(manifest: Manifest) -> dict[str, Any]:
    """The manifest as plain data, left-out keys left out."""
    document: dict[str, Any] = {"version": MANIFEST_VERSION, "model": dict(manifest.model)}
    document |= _given(name=manifest.name, licence=manifest.licence)
    section = _given(**vars(manifest.defaults))
    for key in _DEFAULT_PATHS:
        if key in section:
            section[key] = Path(section[key]).as_posix()
    document |= _given(defaults={key: _plain(value) for key, value in section.items()})
    document["checkpoints"] = [_given(**vars(entry)) for entry in manifest.checkpoints]
    return document


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None and value != {}}


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


# Above 1 / sqrt(12) = 0.2887 no power-function EMA exists; 0.289 is the bound the names go by.
MAX_EMA_STD = 0.289
MAX_EMA_GAMMA = 1e6
MIN_EMA_STD = 1e-7  # a tenth of what the largest exponent has; no training has as many steps


def is_ema_std(width: float) -> bool:
    """Whether a relative width is one that an average of a training can have."""
    return MIN_EMA_STD <= width < MAX_EMA_STD


_PROGRESS = re.compile(r"-(?P<kimg>[0-9]{7,12})(?:-(?P<std>0\.[0-9]{1,6}))?$")


def _nimg(kimg: int) -> int:
    """Images seen behind a file name; of training that advances by other counts, at least these."""
    try:
        return nimg_from_kimg(kimg)
    except ConfigError:
        return 1000 * kimg


def parse_stem(stem: str) -> tuple[int | None, float | None]:
    """(nimg, ema_std) of a file name without its ending; None where it does not say."""
    match = _PROGRESS.search(stem)
    if match is None:
        return None, None
    std = float(match["std"]) if match["std"] else None
    if std is not None and not is_ema_std(std):
        return None, None
    return _nimg(int(match["kimg"])), std
