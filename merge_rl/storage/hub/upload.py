"""Models on the Hub: the files of a model folder, pushed."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from merge_rl.errors import CheckpointError, HubError
from merge_rl.storage.checkpoints import CONFIG_NAME, SCHEDULER_PLACE
from merge_rl.storage.checkpoints import RECIPE_NAME as RECIPE_NAME
from merge_rl.storage.files import (
    INDEX_SUFFIX,
    LAYOUTS,
    followed,
    read_header,
    read_index,
    require_unlocked,
    shard_pattern,
    stem_in,
)
from merge_rl.storage.hub.client import call_hub, client, endpoint, quiet_client
from merge_rl.storage.hub.repository import open_repository, split_repo
from merge_rl.untrusted import open_file

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


def push_folder(
    folder: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = True,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
    wait: Callable[[float], None] = time.sleep,
) -> Pushed:
    """Upload a model folder to a repository of the Hub.

    Weights, config.json, merge.yaml, README.md and pictures are sent, nothing else. The repository
    is made if it is missing. What arrived before a connection broke is not sent again, neither in
    this call nor in the next. Weights of another layout that lie in the repository (one file
    instead of shards, or more shards) are removed by the same commit.

    Args:
        folder: written by `save_model`.
        repo: "user/repo".
        private: make it private, and refuse to write to one that is public.
        revision: branch, which must exist; "main" by default.
        message: title of the commit.
        dry_run: check the files and list them; nothing is sent or asked.
        wait: how to pause between attempts.

    The token comes from `hf auth login` or HF_TOKEN. Raises CheckpointError for folders that
    cannot be pushed, HubError for everything at the Hub.
    """
    repo_id, given = split_repo(repo)
    branch = revision or given
    folder = Path(folder)
    require_unlocked(folder)
    files = tuple(list_model(folder))
    address = endpoint()
    url = f"{address}/{repo_id}"
    if dry_run:
        return Pushed(repo_id=repo_id, url=url, files=files, commit=None, private=private)
    now_private = _prepare_repository(repo_id, private=private, wait=wait)
    commit = _upload(folder, files, repo_id, branch, message or DEFAULT_MESSAGE, wait)
    return Pushed(repo_id=repo_id, url=url, files=files, commit=commit, private=now_private)


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
            delete_patterns=[*LAYOUTS, f"{GUIDE_FOLDER}/*"],
        )

    with quiet_client():
        info = call_hub(once, repo_id, wait=wait)
    return str(info.oid)


CARD_NAME: Final = "README.md"
GUIDE_FOLDER: Final = "guide"  # of a merged model: the merge that guides it
MERGEKIT_NAME: Final = "mergekit.yaml"
PICTURE_ENDINGS: Final = (".png", ".jpg", ".jpeg", ".webp")
PICTURE_FOLDER: Final = "images"


@dataclass(frozen=True, kw_only=True)
class FolderFile:
    """One file to publish."""

    name: str  # relative to the folder, forward slashes
    size: int


def list_model(folder: Path) -> list[FolderFile]:
    """The files of a model folder that are published, checked; weights first.

    Needs weights (model.safetensors, or shards and their index) and README.md; a guide that was
    merged goes along. Everything else in the folder is left out; a link that leads out of it, or
    out of the repository in the Hub's cache that it belongs to, is refused, since what it leads to
    would be published.
    """
    names = [*_weights(folder), *_companions(folder), *_guide(folder / GUIDE_FOLDER)]
    return [FolderFile(name=name, size=_size(folder, name)) for name in names]


def _guide(folder: Path) -> Iterator[str]:
    if folder.is_dir():
        papers = (CONFIG_NAME, SCHEDULER_PLACE, RECIPE_NAME)
        for name in (*_weights(folder), *(name for name in papers if (folder / name).is_file())):
            yield f"{GUIDE_FOLDER}/{name}"


def _weights(folder: Path) -> list[str]:
    stem = stem_in(folder)
    whole, index, pattern = f"{stem}.safetensors", f"{stem}{INDEX_SUFFIX}", shard_pattern(stem)
    homes, single = read_index(folder, stem), (folder / whole).is_file()
    if homes is None and not single:
        raise CheckpointError(f"{folder}: expected {whole}, or shards with {index}")
    if homes is not None and single:
        raise CheckpointError(f"{folder}: found both {whole} and {index}, expected one")
    shards = sorted({path.name for path in homes.values()}) if homes else []
    for name in shards:
        if not fnmatchcase(name, pattern):
            raise CheckpointError(f"{folder}: expected shards named {pattern}, found {name!r}")
    for name in shards or [whole]:
        read_header(folder / name)  # refuses a missing or truncated file
    return [*shards, index] if shards else [whole]


def _companions(folder: Path) -> Iterator[str]:
    if not (folder / CARD_NAME).is_file():
        raise CheckpointError(f"{folder}: expected a model card, {CARD_NAME}")
    known = (CONFIG_NAME, SCHEDULER_PLACE, RECIPE_NAME, MERGEKIT_NAME, CARD_NAME)
    yield from (name for name in known if (folder / name).is_file())
    for place in (folder, folder / PICTURE_FOLDER):
        found = sorted(place.iterdir()) if place.is_dir() else []
        for file in found:
            is_picture = file.suffix.lower() in PICTURE_ENDINGS and file.name[0] != "."
            if is_picture and file.is_file():
                yield file.relative_to(folder).as_posix()


def _size(folder: Path, name: str) -> int:
    path = folder / name
    # The Hub's cache keeps snapshots/COMMIT/NAME as links into the same repository's blobs/.
    cached = folder.parent.name == "snapshots" and (folder.parents[1] / "blobs").is_dir()
    own = folder.parents[1] / "blobs" if cached else folder
    homes = (followed(folder), followed(own))
    if not any(followed(path).is_relative_to(home) for home in homes):
        raise CheckpointError(f"{path}: a link that leaves the folder is not published")
    open_file(path, CheckpointError).close()  # a pointer of Git LFS, say, is no file to publish
    return path.stat().st_size
