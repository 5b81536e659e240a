"""Where checkpoints come from: a catalogued set, a repository of the Hub, or one address."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final
from urllib.parse import unquote, urlsplit

from merge_rl.config import EXAMPLES, whole_number
from merge_rl.errors import ConfigError, DownloadError, HubError, UnknownNameError
from merge_rl.storage.checkpoints import (
    CONFIG_NAME,
    MANIFEST_NAME,
    SCHEDULER_NAME,
    Manifest,
    has_manifest,
    load_catalogue,
    parse_stem,
    read_manifest,
)
from merge_rl.storage.files import INDEX_SUFFIX
from merge_rl.storage.hub.download import probe_file
from merge_rl.storage.hub.repository import Repository, download_file, listed_repository, split_repo
from merge_rl.storage.hub.upload import CARD_NAME, RECIPE_NAME
from merge_rl.storage.hub.web import require_safe, shown

CONVERTIBLE: Final = (".pkl", ".pt", ".pth", ".ckpt")
PROBES: Final = 8  # at a time

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,199}")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
# Written by trainers beside the snapshots: optimiser states, several times larger.
_NOT_A_SNAPSHOT = "training-state-"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files that can be fetched together."""

    name: str  # of the set, the repository, or the address
    files: tuple[RemoteFile, ...]
    companions: tuple[RemoteFile, ...] = ()  # taken with every selection
    licence: str | None = None
    repository: Repository | None = None
    manifest: Manifest | None = None  # of a set that needs no conversion


def find_source(name: str, *, revision: str | None = None, sha256: str | None = None) -> Source:
    """What `name` means: an https address, user/repo[@revision], or a set of the catalogue.

    `revision` is for repositories, `sha256` (64 hexadecimal digits) for addresses.
    """
    address, repository = "://" in name, "://" not in name and "/" in name
    if revision is not None and not repository:
        raise ConfigError(f"a revision belongs to a repository of the Hub, {name!r} is none")
    if sha256 is not None and not address:
        raise ConfigError(f"a hash belongs to one address, {name!r} is none")
    if address:
        return _from_address(name, sha256)
    return _from_hub(name, revision) if repository else _from_catalogue(name)


def with_sizes(files: tuple[RemoteFile, ...]) -> tuple[RemoteFile, ...]:
    """The same files with their sizes, asked of their servers where they are not known."""

    def ask(file: RemoteFile) -> RemoteFile:
        if file.size is not None or file.url is None:
            return file
        body = probe_file(file.url)
        return replace(file, size=body.size, version=body.etag or body.last_modified)

    with ThreadPoolExecutor(PROBES) as pool:
        return tuple(pool.map(ask, files))


def needs_conversion(file: RemoteFile) -> bool:
    """Whether a file is a pickle that has to become a .safetensors."""
    return file.name.endswith(CONVERTIBLE)


def _from_address(url: str, sha256: str | None) -> Source:
    require_safe(url)
    name = unquote(PurePosixPath(urlsplit(url).path).name)
    if not _FILE_NAME.fullmatch(name) or not name.endswith((*CONVERTIBLE, ".safetensors")):
        raise DownloadError(
            f"{shown(url)}: expected the address of a .pkl, .pt, .pth, .ckpt or .safetensors file"
        )
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise ConfigError(f"expected a SHA-256 of 64 hexadecimal digits, got {sha256!r}")
    digest = sha256.lower() if sha256 else None
    return Source(name=shown(url), files=(remote_file(name, url=url, sha256=digest),))


def _from_catalogue(name: str) -> Source:
    known = load_catalogue().find(name)
    if known.embedded:
        raise ConfigError(f"{name} comes with the package; write it with: mergerl demo DIR")
    files = tuple(remote_file(file, url=url) for file, url in known.urls().items())
    if not files:
        raise ConfigError(f"{name}: the catalogue has no addresses for this set")
    return Source(name=name, files=files, licence=known.licence)


def _from_hub(name: str, revision: str | None) -> Source:
    repo_id, given = split_repo(name)
    if revision is not None and given not in (None, revision):
        raise ConfigError(f"two revisions are given, {given!r} and {revision!r}, expected one")
    repository = listed_repository(repo_id, revision or given)
    files = {
        file.name: remote_file(
            file.name, size=file.size, sha256=file.sha256, version=file.sha256 or file.blob_id
        )
        for file in repository.files
    }
    manifest = _hub_manifest(repository) if MANIFEST_NAME in files else None
    if manifest is not None:
        return _converted_set(repository, manifest, files)
    weights = [file for name, file in files.items() if name.endswith(".safetensors")]
    beside = [name for name in files if weights and _describes(name)]
    snapshots = weights or [
        file
        for name, file in files.items()
        if name.endswith(CONVERTIBLE) and not PurePosixPath(name).name.startswith(_NOT_A_SNAPSHOT)
    ]
    if not snapshots:
        raise HubError(
            f"{repo_id}: the repository has no .safetensors, .pkl, .pt, .pth or .ckpt file"
        )
    return Source(
        name=repo_id,
        files=tuple(snapshots),
        companions=tuple(files[name] for name in beside),
        licence=repository.licence,
        repository=repository,
    )


def _describes(name: str) -> bool:
    """Whether a file goes along with the weights of a repository."""
    known = name in (RECIPE_NAME, CARD_NAME) or name.endswith(INDEX_SUFFIX)
    return known or PurePosixPath(name).name in (CONFIG_NAME, SCHEDULER_NAME)


def _hub_manifest(repository: Repository) -> Manifest | None:
    with tempfile.TemporaryDirectory() as folder:
        download_file(repository, MANIFEST_NAME, Path(folder))
        return read_manifest(folder) if has_manifest(Path(folder)) else None


def _converted_set(
    repository: Repository, manifest: Manifest, files: dict[str, RemoteFile]
) -> Source:
    checkpoints = []
    for entry in manifest.checkpoints:
        if entry.file not in files:
            raise HubError(f"{repository.repo_id}: the manifest lists {entry.file!r}, not there")
        said = {"nimg": entry.nimg, "ema_std": entry.ema_std, "track": entry.track}
        checkpoints.append(replace(files[entry.file], **said))  # type: ignore[arg-type]
    defaults = vars(manifest.defaults).values()
    guide = manifest.defaults.sampler.get("guide")
    paths = [path for path in (*defaults, guide and Path(guide)) if isinstance(path, Path)]
    beside = [CARD_NAME, *(path.as_posix() for path in paths)]
    return Source(
        name=repository.repo_id,
        files=tuple(checkpoints),
        companions=tuple(files[name] for name in dict.fromkeys(beside) if name in files),
        licence=manifest.licence or repository.licence,
        repository=repository,
        manifest=manifest,
    )


_STD_TOLERANCE: Final = 5e-4  # names have three decimals


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """One file that can be fetched, and what is known of it beforehand."""

    name: str  # relative path, forward slashes
    url: str | None = None  # None: a file of a Hub repository
    size: int | None = None
    sha256: str | None = None
    version: str | None = None  # changes with the content: ETag, blob id
    nimg: int | None = None
    ema_std: float | None = None
    track: str | None = None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What to take; nothing set means everything but untrained snapshots.

    `last` is a number of training times, `every` the distance between them in training images,
    counted back from the newest; where no snapshot was taken at that time the nearest one stands
    in. `files` are names, with or without folder and ending.
    """

    last: int | None = None
    every: int | None = None
    track: str | None = None
    ema_std: tuple[float, ...] = ()
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("last", "every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"expected {name} of at least 1, got {value}")


def parse_count(text: str) -> int:
    """A number of images, in any of the ways that numbers are written here."""
    count = whole_number(text)
    if count is None or count < 0:
        raise ConfigError(f"expected a number of images such as {EXAMPLES}, got {text!r}")
    return count


def remote_file(name: str, **known: object) -> RemoteFile:
    """A file with the progress and EMA width that its name says."""
    nimg, ema_std = parse_stem(PurePosixPath(name).stem)
    track = None if nimg is None else "raw" if ema_std is None else f"ema-{ema_std:.3f}"
    said = {"nimg": nimg, "ema_std": ema_std, "track": track}
    return RemoteFile(name=name, **{**said, **known})  # type: ignore[arg-type]


def choose_times(times: Sequence[int], *, last: int | None, every: int | None) -> list[int]:
    """Training times to keep, ascending.

    With `every` the targets are newest - k * every for k = 0, 1, ... (`last` of them, else while
    positive), and the nearest time to each is kept, once; of two equally near the newer.
    """
    known = sorted(set(times))
    if every is None:
        return known[-last:] if last else known
    newest = known[-1]
    count = last if last is not None else newest // every + 1
    targets = [newest - k * every for k in range(count) if newest - k * every > 0]
    return sorted({min(known, key=lambda time: (abs(time - t), -time)) for t in targets})


def select_files(
    files: Sequence[RemoteFile], selection: Selection, where: str
) -> tuple[RemoteFile, ...]:
    """The selected files in their order; ConfigError or UnknownNameError where none fits."""
    chosen = _named(files, selection.files) if selection.files else list(files)
    if selection.track is not None:
        known = {file.track for file in chosen if file.track}
        if selection.track not in known:
            raise UnknownNameError("track", selection.track, known)
        chosen = [file for file in chosen if file.track == selection.track]
    if selection.ema_std:
        chosen = _of_width(chosen, selection.ema_std, where)
    if selection.last is not None or selection.every is not None:
        trained = [file for file in chosen if file.nimg]
        if not trained:
            raise ConfigError(f"{where}: no file name tells its training time (NAME-0008388.pkl)")
        times = [file.nimg or 0 for file in trained]
        kept = set(choose_times(times, last=selection.last, every=selection.every))
        chosen = [file for file in trained if file.nimg in kept]
    elif not selection.files and len(files) > 1:  # an address of one file means that one
        chosen = [file for file in chosen if file.nimg != 0]
    if not chosen:
        raise ConfigError(f"{where}: the selection of files is empty")
    return tuple(chosen)


def _named(files: Sequence[RemoteFile], names: Sequence[str]) -> list[RemoteFile]:
    chosen = []
    for name in names:
        found = [file for file in files if name in _names_of(file)]
        if len(found) != 1:
            raise UnknownNameError("file", name, {file.name for file in files})
        chosen += found
    return [file for file in files if file in chosen]


def _names_of(file: RemoteFile) -> set[str]:
    path = PurePosixPath(file.name)
    return {file.name, path.name, path.stem, str(path.with_suffix(""))}


def _of_width(files: Sequence[RemoteFile], widths: Sequence[float], where: str) -> list[RemoteFile]:
    known = sorted({file.ema_std for file in files if file.ema_std is not None})
    for width in widths:
        if not any(abs(width - other) < _STD_TOLERANCE for other in known):
            listed = ", ".join(f"{other:.3f}" for other in known) or "none"
            raise ConfigError(f"{where}: no file has ema_std {width} (there are: {listed})")
    return [
        file
        for file in files
        if file.ema_std is not None
        and any(abs(file.ema_std - width) < _STD_TOLERANCE for width in widths)
    ]
