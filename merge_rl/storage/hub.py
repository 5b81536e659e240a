"""Models on the Hub: push a run's model, and load a model by the name of its repository."""

from __future__ import annotations

import fnmatch
import glob
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from merge_rl.errors import HubError
from merge_rl.storage.hub_client import client, endpoint, quiet_client
from merge_rl.storage.hub_errors import UnreachableError, call_hub
from merge_rl.storage.model_file import CONFIG_NAME
from merge_rl.storage.model_folder import SHARD_PATTERN, FolderFile, list_model, model_folder
from merge_rl.storage.repository import (
    HubFile,
    Repository,
    check_file,
    get_file,
    looks_like_repo,
    open_repository,
    split_repo,
)
from merge_rl.storage.shards import INDEX_NAME, MODEL_NAME

DEFAULT_MESSAGE: Final = "Upload a merged model"


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What a push has written, or would write."""

    repo_id: str
    url: str
    files: tuple[FolderFile, ...]
    commit: str | None  # None: nothing was sent
    private: bool

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def push(
    run: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = True,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
    wait: Callable[[float], None] = time.sleep,
) -> Pushed:
    """Upload the model of a finished run, or a model folder, to a repository of the Hub.

    Weights, config.json, merge.yaml, README.md and pictures are sent, nothing else. The repository
    is made if it is missing. What arrived before a connection broke is not sent again, neither in
    this call nor in the next. Weights of another layout that lie in the repository (one file
    instead of shards, or more shards) are removed by the same commit.

    Args:
        run: run directory with `merged/`, or a folder written by `save_model`.
        repo: "user/repo".
        private: make it private, and refuse to write to one that is public.
        revision: branch, which must exist; "main" by default.
        message: title of the commit.
        dry_run: check the files and list them; nothing is sent or asked.
        wait: how to pause between attempts.

    The token comes from `hf auth login` or HF_TOKEN. Raises CheckpointError and RunError for
    folders that cannot be pushed, HubError for everything at the Hub.
    """
    repo_id, given = split_repo(repo)
    branch = revision or given
    folder = model_folder(run)
    files = tuple(list_model(folder))
    address = endpoint()
    url = f"{address}/{repo_id}"
    if dry_run:
        return Pushed(repo_id=repo_id, url=url, files=files, commit=None, private=private)
    now_private = _prepare_repository(repo_id, private=private, wait=wait)
    commit = _upload(folder, files, repo_id, branch, message or DEFAULT_MESSAGE, wait)
    return Pushed(repo_id=repo_id, url=url, files=files, commit=commit, private=now_private)


def local_model(path: str | os.PathLike[str]) -> Path:
    """A path as it is; a text that names no path here but a repository of the Hub, downloaded."""
    if isinstance(path, str) and not os.path.lexists(path) and looks_like_repo(path):
        try:
            return cached_model(path)
        except HubError as error:
            raise HubError(
                f"{path}: no such file or folder, and not from the Hub: {error}"
            ) from None
    return Path(path)


def cached_model(text: str) -> Path:
    """The model of "user/repo" or "user/repo@revision" in the client's cache, downloaded there.

    Only the weights and `config.json` are fetched. Without a connection the cached copy serves.
    Returns a `.safetensors` file, or the folder of a model in shards.
    """
    repo_id, revision = split_repo(text)
    try:
        repository = open_repository(repo_id, revision)
    except UnreachableError as error:
        return _offline_model(repo_id, revision, error)
    names = [file.name for file in repository.files]
    weights = _weights_among(repo_id, names)
    wanted = [*weights, *(name for name in names if name == CONFIG_NAME)]
    paths = [_cached_file(repository, repository.find(name), revision) for name in wanted]
    if any(path.parent.name != repository.commit for path in paths):
        raise HubError(f"{repo_id}: the repository changed during the download; try again")
    return paths[0] if len(weights) == 1 else paths[0].parent


def _prepare_repository(repo_id: str, *, private: bool, wait: Callable[[float], None]) -> bool:
    """Make the repository unless it exists; whether it is private."""
    api = client()
    with quiet_client():
        call_hub(
            lambda: api.create_repo(repo_id, private=private, exist_ok=True), repo_id, wait=wait
        )
    is_private = open_repository(repo_id).private
    if private and not is_private:
        # What was once public cannot be called back.
        raise HubError(
            f"{repo_id}: the repository exists and is public, expected a private one "
            "(pass --public, or private=False, to push there)"
        )
    return is_private


def _upload(
    folder: Path,
    files: tuple[FolderFile, ...],
    repo_id: str,
    branch: str | None,
    message: str,
    wait: Callable[[float], None],
) -> str:
    api = client()

    def once() -> Any:
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=branch,
            commit_message=message,
            allow_patterns=[glob.escape(file.name) for file in files],
            delete_patterns=[MODEL_NAME, INDEX_NAME, SHARD_PATTERN],
        )

    with quiet_client():
        info = call_hub(once, repo_id, wait=wait)
    return str(info.oid)


def _weights_among(repo_id: str, names: list[str]) -> list[str]:
    """Which of these files are the weights of one model; an index comes first."""
    if INDEX_NAME in names:
        shards = fnmatch.filter(names, SHARD_PATTERN)
        return [INDEX_NAME, *sorted(shards)]
    if MODEL_NAME in names:
        return [MODEL_NAME]
    found = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if len(found) != 1:
        several = f"{len(found)} .safetensors files" if found else "no .safetensors file"
        raise HubError(f"{repo_id}: expected one model, found {several} (for sets: mergerl fetch)")
    return found


def _cached_file(repository: Repository, file: HubFile, revision: str | None) -> Path:
    from huggingface_hub import try_to_load_from_cache

    known = try_to_load_from_cache(repository.repo_id, file.name, revision=repository.commit)
    # By the name of the revision, not the commit: offline, the cache knows names it was asked.
    path = get_file(repository, file, revision)
    if not isinstance(known, str):
        check_file(path, file, f"{repository.repo_id}, {file.name}")
    return path


def _offline_model(repo_id: str, revision: str | None, error: UnreachableError) -> Path:
    from huggingface_hub import try_to_load_from_cache

    for name in (INDEX_NAME, MODEL_NAME, CONFIG_NAME):
        found = try_to_load_from_cache(repo_id, name, revision=revision)
        if isinstance(found, str):
            folder = Path(found).parent
            weights = _weights_among(repo_id, sorted(file.name for file in folder.iterdir()))
            return folder / weights[0] if len(weights) == 1 else folder
    raise HubError(f"{error} (and no copy is stored here)")
