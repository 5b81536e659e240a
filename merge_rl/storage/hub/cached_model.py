"""One model of a repository of the Hub, in the cache of the Hub's client."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from merge_rl.errors import HubError
from merge_rl.interfaces import NullTracker, Tracker
from merge_rl.storage.checkpoints import CONFIG_NAME
from merge_rl.storage.files import LAYOUTS
from merge_rl.storage.hub.client import UnreachableError
from merge_rl.storage.hub.fetch import advancing
from merge_rl.storage.hub.repository import (
    DESCRIBING,
    HubFile,
    Repository,
    check_file,
    get_file,
    listed_repository,
    split_repo,
)
from merge_rl.storage.hub.upload import CARD_NAME, GUIDE_FOLDER, RECIPE_NAME

LIMIT_BYTES: Final = 10 * 10**9  # what is larger is for `mergerl fetch`, which asks

_GUIDE: Final = f"{GUIDE_FOLDER}/"
_LAYOUTS: Final = (LAYOUTS[:3], LAYOUTS[3:])  # file, index, shards: ours, and diffusers'


def cached_model(text: str, tracker: Tracker | None = None) -> Path:
    """The model of "user/repo" or "user/repo@revision" in the client's cache, downloaded there.

    Only the weights and `config.json` are fetched, and of a merge its recipe, card and guide, of
    which one event tells beforehand. Without a connection the cached copy serves. Returns a
    `.safetensors` file, or the folder of a model in shards.
    """
    repo_id, revision = split_repo(text)
    try:
        repository = listed_repository(repo_id, revision, hasty=True)
    except UnreachableError as error:
        return _offline_model(repo_id, revision, error)
    names = [file.name for file in repository.files]
    weights = _one_model(repo_id, names)
    wanted = [*weights, *(name for name in names if name in DESCRIBING), *_of_a_merge(names)]
    paths = cached_files(repository, wanted, revision, tracker)
    return paths[0] if len(weights) == 1 else paths[0].parent


def cached_recipe(text: str, tracker: Tracker | None = None) -> Path:
    """The recipe of "user/repo" or "user/repo@revision" in the client's cache, its guide beside it.

    Nothing is downloaded of the merge itself. Raises HubError for a repository without a recipe.
    """
    repo_id, revision = split_repo(text)
    try:
        repository = listed_repository(repo_id, revision, hasty=True)
    except UnreachableError as error:
        return _kept(repo_id, revision, [RECIPE_NAME], error)
    wanted = _of_a_merge([file.name for file in repository.files])
    if not wanted:
        raise HubError(f"{repo_id}: expected a recipe ({RECIPE_NAME}), found none")
    paths = cached_files(repository, wanted, revision, tracker)
    return paths[wanted.index(RECIPE_NAME)]


def cached_files(
    repository: Repository, names: Sequence[str], revision: str | None, tracker: Tracker | None
) -> list[Path]:
    """Files of a repository in the client's cache, checked; one event tells what will come."""
    repo_id = repository.repo_id
    files = [repository.find(name) for name in names]
    missing = [file for file in files if not _is_cached(repository, file)]
    sizes, heard = [file.size or 0 for file in missing], tracker or NullTracker()
    tell_download(repo_id, sizes, sum(sizes), heard)
    paths = [_cached_file(repository, file, revision, file in missing, heard) for file in files]
    if any(
        path.parts[-1 - name.count("/") - 1] != repository.commit
        for path, name in zip(paths, names, strict=True)
    ):
        raise HubError(f"{repo_id}: the repository changed during the download; try again")
    return paths


def _one_model(repo_id: str, names: list[str]) -> list[str]:
    found = weights_among(names)
    if not found:
        count = sum(name.endswith(".safetensors") for name in names) or "no"
        raise HubError(
            f"{repo_id}: expected one model, found {count} .safetensors "
            f"{'file' if count == 'no' else 'files'} (for sets: mergerl fetch)"
        )
    return found


def _of_a_merge(names: list[str]) -> list[str]:
    """What says how a merge is sampled: its recipe and its card, and the merge that guides it."""
    if RECIPE_NAME not in names:
        return []
    inside = [name.removeprefix(_GUIDE) for name in names if name.startswith(_GUIDE)]
    guide = [*weights_among(inside), *(name for name in inside if name in DESCRIBING)]
    beside = [name for name in names if name in (RECIPE_NAME, CARD_NAME)]
    return [*beside, *(f"{_GUIDE}{name}" for name in guide)]


def weights_among(names: list[str]) -> list[str]:
    """Which of these files are the weights of one model, an index first; none of several models."""
    for whole, index, pattern in _LAYOUTS:
        if index in names:
            return [index, *sorted(fnmatch.filter(names, pattern))]
        if whole in names:
            return [whole]
    found = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    return found if len(found) == 1 else []


def _is_cached(repository: Repository, file: HubFile) -> bool:
    from huggingface_hub import try_to_load_from_cache

    known = try_to_load_from_cache(repository.repo_id, file.name, revision=repository.commit)
    return isinstance(known, str)


def _cached_file(
    repository: Repository, file: HubFile, revision: str | None, missing: bool, tracker: Tracker
) -> Path:
    if missing:
        tracker.phase(f"download {file.name}", file.size or 0)
    # By the name of the revision, not the commit: offline, the cache knows names it was asked.
    path = get_file(repository, file, revision, progress=advancing(tracker) if missing else None)
    if missing:
        check_file(path, file, f"{repository.repo_id}, {file.name}")
    return path


def _offline_model(repo_id: str, revision: str | None, error: UnreachableError) -> Path:
    known = [name for whole, index, _ in _LAYOUTS for name in (index, whole)]
    folder = _kept(repo_id, revision, (*known, CONFIG_NAME), error).parent
    weights = _one_model(repo_id, sorted(file.name for file in folder.iterdir()))
    return folder / weights[0] if len(weights) == 1 else folder


def _kept(
    repo_id: str, revision: str | None, names: Sequence[str], error: UnreachableError
) -> Path:
    """The first of these files that is in the client's cache; HubError where none is."""
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        found = try_to_load_from_cache(repo_id, name, revision=revision)
        if isinstance(found, str):
            return Path(found)
    raise HubError(f"{error} (and no copy is stored here)")


def tell_download(repo_id: str, sizes: Sequence[int], total: int, tracker: Tracker) -> None:
    """Say how much will come; HubError where that is more than goes without being asked for."""
    if not sizes:
        return
    files = f"{len(sizes)} {'file' if len(sizes) == 1 else 'files'}"
    if total > LIMIT_BYTES:
        raise HubError(
            f"{repo_id} has {files} to download, {total / 1e9:,.1f} GB, and more than "
            f"{LIMIT_BYTES / 1e9:g} GB is not fetched on the way; run mergerl fetch {repo_id} DIR, "
            "then use DIR"
        )
    text = f"{repo_id}: {files} to download from the Hub, {total / 1e6:,.1f} MB"
    tracker.event({"kind": "note", "text": text})
