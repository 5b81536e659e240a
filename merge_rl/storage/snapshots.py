"""Which of many published snapshots to take: by series, EMA width, and distance in training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from merge_rl.errors import ConfigError, UnknownNameError
from merge_rl.storage.naming import parse_stem

UNITS: Final = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_COUNT = re.compile(r"([0-9][0-9_,]*)\s*(Ki|Mi|Gi)?", re.IGNORECASE)
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
    """A number of images: "8388608", "8_388_608", "192Mi" (Ki, Mi, Gi: powers of 1024)."""
    match = _COUNT.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"expected a number of images such as 8388608 or 192Mi, got {text!r}")
    digits = match[1].replace("_", "").replace(",", "")
    return int(digits) * UNITS[(match[2] or "").capitalize()]


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
    elif not selection.files:
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
