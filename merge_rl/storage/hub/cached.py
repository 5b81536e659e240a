"""Repositories of the Hub in the place of paths: fetched where they are used, and kept.

A single model goes through the cache of the Hub's client. A set lies in a folder a commit, as
`mergerl fetch` writes it, since what is published as pickles is converted on the way.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from merge_rl.errors import BusyError, CheckpointError, HubError, RunError
from merge_rl.interfaces import NullTracker, Tracker
from merge_rl.storage.checkpoints import MANIFEST_NAME, by_progress
from merge_rl.storage.files import as_path, write_json
from merge_rl.storage.hub.cached_model import (
    cached_files,
    cached_model,
    cached_recipe,
    tell_download,
    weights_among,
)
from merge_rl.storage.hub.client import UnreachableError
from merge_rl.storage.hub.fetch import run_fetch
from merge_rl.storage.hub.fetch_plan import plan_fetch
from merge_rl.storage.hub.fetch_sources import Selection, find_source, select_files
from merge_rl.storage.hub.repository import (
    Repository,
    listed_repository,
    listing_once,
    looks_like_repo,
    split_repo,
)
from merge_rl.untrusted import load_json_mapping, read_bounded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from merge_rl.storage.hub.fetch_plan import FetchPlan

WAIT_SECONDS: Final = 1.0  # between looks at a folder that another process fetches into
WHOLE: Final = "set"


def local_model(path: str | os.PathLike[str], tracker: Tracker | None = None) -> Path:
    """A path as it is; a text that names no path here but a repository of the Hub, downloaded."""
    if (name := _named(path)) is None:
        return Path(path)
    with _not_here(name):
        return cached_model(name, tracker)


def local_set(path: str | os.PathLike[str], tracker: Tracker | None = None) -> Path:
    """The same of a set: its folder, with all its checkpoints."""
    if (name := _named(path)) is None:
        return Path(path)
    with _not_here(name):
        return cached_set(name, tracker=tracker)


def local_place(
    path: str | os.PathLike[str], track: str | None = None, tracker: Tracker | None = None
) -> Path:
    """The same of either: the folder of a set has its newest checkpoint, of `track`, at least."""
    if (name := _named(path)) is None:
        return Path(path)
    with _not_here(name):
        if track is None and not _is_set(name):
            return cached_model(name, tracker)
        return cached_set(name, newest=True, track=track, tracker=tracker)


def local_recipe(path: str | os.PathLike[str], tracker: Tracker | None = None) -> Path:
    """The same of a recipe: the `merge.yaml` of a repository."""
    if (name := _named(path)) is None:
        return Path(path)
    with _not_here(name):
        return cached_recipe(name, tracker)


def local_sources(
    path: str | os.PathLike[str], tracker: Tracker | None = None
) -> tuple[list[Path], str | None]:
    """(the same of what is to be converted: files as they were published, or their folder; licence)

    Raises CheckpointError for a set that needs no conversion.
    """
    if (name := _named(path)) is None:
        return [Path(path)], None
    with _not_here(name):
        return cached_sources(name, tracker)


def is_set_of_hub(path: str | os.PathLike[str]) -> bool:
    """Whether `path` names no path here, but a repository of the Hub that holds a set."""
    if (name := _named(path)) is None:
        return False
    with _not_here(name):
        return _is_set(name)


def _named(path: str | os.PathLike[str]) -> str | None:
    as_path(path, "a model or set")
    named = isinstance(path, str) and not os.path.lexists(path) and looks_like_repo(path)
    return str(path) if named else None


@contextmanager
def _not_here(name: str) -> Iterator[None]:
    try:
        with listing_once():
            yield
    except HubError as error:
        raise HubError(f"{name}: no such file or folder, and not from the Hub: {error}") from None


def _is_set(name: str) -> bool:
    """Whether a repository holds more than one model, or one that has to be converted."""
    repo_id, revision = split_repo(name)
    try:
        names = [file.name for file in listed_repository(repo_id, revision, hasty=True).files]
    except UnreachableError:
        return bool(_References(repo_id).known)
    return MANIFEST_NAME in names or len(weights_among(names)) == 0


def cached_set(
    text: str, *, newest: bool = False, track: str | None = None, tracker: Tracker | None = None
) -> Path:
    """The set of "user/repo" or "user/repo@revision" in this package's cache, fetched there.

    One event tells beforehand how much comes. Files are checked, resumed and converted as by
    `mergerl fetch`; another process that fetches the same is waited for. With `newest`, of a set
    with a manifest only the newest checkpoint (of `track`) has to come. Without a connection what
    came whole serves. Raises HubError, and for more than `LIMIT_BYTES` names the command.
    """
    repo_id, revision = split_repo(text)
    references = _References(repo_id)
    part = f"newest {track}" if newest and track else "newest" if newest else WHOLE
    key = f"{revision or 'main'} {part}"
    if revision is not None and references.known.get(key) == revision:
        return references.folder(revision)
    try:
        repository = listed_repository(repo_id, revision, hasty=True)
    except UnreachableError as error:
        if key not in references.known:
            raise HubError(f"{error} (and no copy is stored here)") from None
        return references.folder(references.known[key])
    folder = references.folder(repository.commit)
    if not references.has(repository.commit, part):
        heard = tracker or NullTracker()
        _when_free(lambda: _fetch(repository, folder, newest, track, heard), heard)
    references.add(key, repository.commit)
    return folder


def cached_sources(text: str, tracker: Tracker | None = None) -> tuple[list[Path], str | None]:
    """(all files that `mergerl fetch` would take, in the client's cache, or their folder; licence).

    Raises HubError where they cannot come, CheckpointError for a set that has its manifest.
    """
    source, (_, revision) = find_source(text), split_repo(text)
    if source.manifest is not None or source.repository is None:
        raise CheckpointError(
            f"{text}: a set of .safetensors already, nothing to convert; mergerl fetch {text} DIR "
            "writes it to a folder"
        )
    names = [file.name for file in (*source.files, *source.companions)]
    paths = cached_files(source.repository, names, revision, tracker)[: len(source.files)]
    inner = [name for name in names[: len(paths)] if "/" in name]
    if inner:  # a folder each, whose names say the steps
        paths = [paths[names.index(inner[0])].parents[inner[0].count("/")]]
    return paths, source.licence


def _fetch(
    repository: Repository, folder: Path, newest: bool, track: str | None, tracker: Tracker
) -> None:
    place = f"{repository.repo_id}@{repository.commit}"
    plan = plan_fetch(place, folder, delete_original=True)
    manifest = plan.source.manifest
    if newest and manifest is not None:
        files = select_files(plan.source.files, Selection(track=track), repository.repo_id)
        names = {file.name for file in files}
        last = by_progress(tuple(e for e in manifest.checkpoints if e.file in names))[-1].file
        plan = plan_fetch(place, folder, selection=Selection(files=(last,)), delete_original=True)
    tell_download(repository.repo_id, _sizes(plan), plan.to_download, tracker)
    try:
        run_fetch(plan, tracker=tracker)
    except BusyError:
        raise
    except (OSError, RunError) as error:
        raise HubError(f"{error}; XDG_CACHE_HOME moves the folder that sets are kept in") from None


def _sizes(plan: FetchPlan) -> list[int]:
    return [file.size or 0 for file in plan.todo]


def _when_free(action: Callable[[], None], tracker: Tracker) -> None:
    """Do it when no other process does: another rank, or a command beside this one."""
    told = False
    while True:
        try:
            return action()
        except BusyError as error:
            if not told:
                tracker.event({"kind": "note", "text": f"waiting: {error}"})
            told = True
            time.sleep(WAIT_SECONDS)


class _References:
    """Which commits of a repository lie here, by what was asked for: "REVISION PART"."""

    def __init__(self, repo_id: str) -> None:
        self._place = user_cache() / "sets" / f"{repo_id}.json"
        found = self._place.is_file()
        known = load_json_mapping(read_bounded(self._place), str(self._place)) if found else {}
        self.known = {key: commit for key, commit in known.items() if isinstance(commit, str)}

    def folder(self, commit: str) -> Path:
        """Where the set of a commit lies; runs are named after it."""
        return self._place.with_name(f"{self._place.stem}@{commit[:12]}")

    def has(self, commit: str, part: str) -> bool:
        """Whether that part of a commit is here, or all of it."""
        parts = {key.partition(" ")[2] for key, known in self.known.items() if known == commit}
        return not parts.isdisjoint((part, WHOLE))

    def add(self, key: str, commit: str) -> None:
        """Remember what has come."""
        if self.known.get(key) != commit:
            self.known[key] = commit
            write_json(self._place, self.known)


def user_cache() -> Path:
    """Where this package keeps what it has fetched; the folder need not exist."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: relative paths are to be ignored.
    root = Path(given) if given and Path(given).is_absolute() else Path.home() / ".cache"
    return root / "merge_rl"
