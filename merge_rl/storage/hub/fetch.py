"""Fetch published checkpoints: download, convert, record.

One file after the other is downloaded, converted and, if so wished, deleted, so that little more
disk is needed than for what stays.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from merge_rl.errors import ConfigError, DownloadError
from merge_rl.interfaces import NullTracker, Tracker
from merge_rl.storage.checkpoints import MANIFEST_NAME, relative_inside, write_manifest
from merge_rl.storage.files import Progress, locked, sha256_file
from merge_rl.storage.hub.download import fetch_url
from merge_rl.storage.hub.fetch_plan import (
    ORIGINALS,
    FetchedFile,
    FetchPlan,
    FetchRecord,
    target_path,
)
from merge_rl.storage.hub.fetch_sources import RemoteFile, needs_conversion
from merge_rl.storage.hub.repository import download_file

INCOMING: Final = ".incoming"


class Converter(Protocol):
    """What `merge_rl.storage.convert.convert` does, as far as it is used here."""

    def __call__(
        self,
        sources: Path,
        folder: Path,
        /,
        *,
        delete_source: bool,
        name: str | None,
        licence: str | None,
        tracker: Tracker | None,
    ) -> Any:
        """Convert one file into `folder`; the result names `written` and `skipped` outputs."""
        ...


@dataclass(frozen=True, kw_only=True)
class FetchResult:
    """What is in the folder now."""

    folder: Path
    fetched: tuple[str, ...]  # names of the files that came in this call
    kept: tuple[str, ...]  # of those that were here already
    outputs: tuple[Path, ...]  # files of the selection that can be used


def run_fetch(
    plan: FetchPlan, *, convert: Converter | None = None, tracker: Tracker | None = None
) -> FetchResult:
    """Download and convert what is missing, one file after the other.

    A cut connection is resumed; after an interruption the same call goes on. `convert` is
    `merge_rl.storage.convert.convert` unless another one is given.
    """
    if plan.disk_needed > plan.disk_free:
        raise DownloadError(
            f"{plan.folder}: expected {plan.disk_needed:,} bytes of free disk, "
            f"found {plan.disk_free:,}"
        )
    with locked(plan.folder):
        record = _fetch(plan, convert, tracker or NullTracker())
    outputs = [name for file in plan.files for name in record.files[file.name].outputs]
    return FetchResult(
        folder=plan.folder,
        fetched=tuple(file.name for file in plan.todo),
        kept=tuple(file.name for file in plan.files if file.name in plan.done),
        outputs=tuple(plan.folder / name for name in dict.fromkeys(outputs)),
    )


def _fetch(plan: FetchPlan, convert: Converter | None, tracker: Tracker) -> FetchRecord:
    record = FetchRecord.open(plan.folder, plan.source.name)
    record.write()
    try:
        for file in plan.todo:
            if not record.is_done(file):  # nor by another process, since the plan was made
                record.add(file.name, _fetch_one(plan, file, record, convert, tracker))
    finally:
        shutil.rmtree(plan.folder / INCOMING, ignore_errors=True)
    _remove_if_empty(plan.folder / ORIGINALS)
    _write_manifest(plan, record)
    return record


def _fetch_one(
    plan: FetchPlan,
    file: RemoteFile,
    record: FetchRecord,
    convert: Converter | None,
    tracker: Tracker,
) -> FetchedFile:
    target = target_path(plan.folder, file)
    relative_inside(plan.folder, target.relative_to(plan.folder).as_posix(), plan.source.name)
    tracker.phase(f"download {file.name}", file.size or 0)
    sha256 = _download(plan, file, target, record, advancing(tracker))
    size = target.stat().st_size
    outputs = {file.name: sha256}
    if needs_conversion(file):
        outputs = _convert(plan, target, convert, tracker)
    return FetchedFile(size=size, version=file.version, sha256=sha256, outputs=outputs)


def _download(
    plan: FetchPlan, file: RemoteFile, target: Path, record: FetchRecord, progress: Progress
) -> str:
    """Bring one file to `target`; its hash. An original that is still here serves again."""
    if file.url is not None:
        known = record.files.get(file.name)
        same = known is not None and (known.size, known.version) == (file.size, file.version)
        expected = file.sha256 or (known.sha256 if known is not None and same else None)
        found = fetch_url(file.url, target, size=file.size, sha256=expected, progress=progress)
        return found.sha256
    if plan.source.repository is None:
        raise ConfigError(f"{file.name}: expected an address or a repository, found neither")
    if file.sha256 is not None and target.is_file() and sha256_file(target) == file.sha256:
        return file.sha256
    incoming = plan.folder / INCOMING
    path = download_file(plan.source.repository, file.name, incoming, progress)
    target.parent.mkdir(parents=True, exist_ok=True)
    path.replace(target)
    return sha256_file(target)


def _convert(
    plan: FetchPlan, original: Path, convert: Converter | None, tracker: Tracker
) -> dict[str, str]:
    """Convert one file; relative path -> hash of what came out."""
    if convert is None:
        from merge_rl.storage.convert import convert as own

        convert = own
    result = convert(
        original,
        plan.folder,
        delete_source=plan.delete_original,
        name=plan.source.name,
        licence=plan.source.licence,
        tracker=tracker,
    )
    paths = [Path(path) for path in (*result.written, *result.skipped)]
    return {path.relative_to(plan.folder).as_posix(): sha256_file(path) for path in paths}


def _write_manifest(plan: FetchPlan, record: FetchRecord) -> None:
    """The manifest of a set that came converted, with the checkpoints that are here."""
    manifest = plan.source.manifest
    if manifest is not None:
        here = tuple(entry for entry in manifest.checkpoints if entry.file in record.files)
        write_manifest(plan.folder / MANIFEST_NAME, replace(manifest, checkpoints=here))


def advancing(tracker: Tracker) -> Callable[[int, int], None]:
    """From bytes done to bytes more."""
    last = 0

    def progress(done: int, _total: int) -> None:
        nonlocal last
        tracker.advance(done - last)
        last = done

    return progress


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(path.is_file() for path in folder.rglob("*")):
        shutil.rmtree(folder)
