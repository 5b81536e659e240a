"""Repositories of the Hub: their names, what is in them, one file of them.

What comes is checked against what the repository lists: names, sizes, hashes.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from merge_rl.errors import HashMismatchError, HubError
from merge_rl.storage.checkpoints import (
    CONFIG_NAME,
    SCHEDULER_NAME,
    SCHEDULER_PLACE,
    relative_inside,
)
from merge_rl.storage.files import Progress, sha256_file
from merge_rl.storage.hub.client import (
    HUB_LIBRARY,
    call_hub,
    client,
    endpoint,
    meter_class,
    quiet_client,
)

TIMEOUT_SECONDS: Final = 30.0
DESCRIBING: Final = (CONFIG_NAME, SCHEDULER_NAME, SCHEDULER_PLACE)

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,95}[A-Za-z0-9_])?"
_REPO = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9_][A-Za-z0-9_./-]{{0,199}}))?")
_FILE_ENDINGS: Final = (".safetensors", ".pkl", ".pt", ".pth", ".npz", ".yaml", ".json")


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """One file of a repository."""

    name: str  # path in the repository
    size: int | None
    sha256: str | None  # of large files; small ones have a blob id only
    blob_id: str | None


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A repository at one commit."""

    repo_id: str
    commit: str
    private: bool
    files: tuple[HubFile, ...]
    licence: str | None = None  # as the model card says

    def find(self, name: str) -> HubFile:
        """The file of that name; HubError if there is none."""
        for file in self.files:
            if file.name == name:
                return file
        raise HubError(f"{self.repo_id}: the repository has no file {name!r}")


def split_repo(text: str) -> tuple[str, str | None]:
    """user/repo@revision -> ("user/repo", "revision"); None without a revision."""
    match = _REPO.fullmatch(text) if isinstance(text, str) else None
    if match is None or ".." in text or "--" in match[1]:
        raise HubError(f"expected a repository as user/repo or user/repo@revision, got {text!r}")
    return match[1], match[2]


def looks_like_repo(text: str) -> bool:
    """Whether `text` has the form of a repository, and not of a file."""
    try:
        repo_id, _ = split_repo(text)
    except HubError:
        return False
    return not repo_id.endswith(_FILE_ENDINGS)


_LISTED: Final[ContextVar[dict[tuple[str, str | None], Repository] | None]] = ContextVar(
    "listed", default=None
)


def list_once() -> None:
    """From now on in this context a repository is listed once: what a command takes is one state.

    A command that ends leaves its context; so does `listing_once`.
    """
    if _LISTED.get() is None:
        _LISTED.set({})


@contextmanager
def listing_once() -> Iterator[None]:
    """The same inside the block alone."""
    before = _LISTED.get()
    list_once()
    try:
        yield
    finally:
        _LISTED.set(before)


def listed_repository(repo_id: str, revision: str | None, *, hasty: bool = False) -> Repository:
    """`open_repository`, or what it gave before where repositories are listed once."""
    known = _LISTED.get()
    found = None if known is None else known.get((repo_id, revision))
    if found is None:
        found = open_repository(repo_id, revision, hasty=hasty)
    if known is not None:
        known[repo_id, revision] = known[repo_id, found.commit] = found
    return found


def open_repository(
    repo_id: str, revision: str | None = None, *, hasty: bool = False
) -> Repository:
    """Files of a repository at the newest commit of `revision`, by one request.

    `hasty`: what a name means may be a slip, or lie here already; without a connection none is
    waited for.

    Raises HubError if there is no such repository or revision, or if a name leaves the folder.
    """
    api = client()
    subject = f"{repo_id}@{revision}" if revision else repo_id
    with quiet_client():
        info: Any = call_hub(
            lambda: api.model_info(
                repo_id, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS
            ),
            subject,
            hasty=hasty,
        )
    if not isinstance(info.sha, str) or not re.fullmatch(r"[0-9a-fA-F]{40}", info.sha):
        raise HubError(f"{subject}: the Hub named no commit, found {info.sha!r}")
    files = tuple(_hub_file(repo_id, sibling) for sibling in info.siblings or ())
    licence = getattr(info.card_data, "license", None)
    return Repository(
        repo_id=repo_id,
        commit=info.sha,
        private=bool(info.private),
        files=files,
        licence=licence if isinstance(licence, str) else None,
    )


def download_file(
    repository: Repository, name: str, folder: Path, progress: Progress | None = None
) -> Path:
    """One file of a repository to `folder`/name, checked for size and hash.

    A cut connection is resumed; what has come is lost only when the program ends. Leaves the
    client's notes in `folder`/.cache. Raises HubError, HashMismatchError.
    """
    file = repository.find(name)
    relative_inside(folder, name, repository.repo_id)
    path = get_file(repository, file, repository.commit, folder=folder, progress=progress)
    check_file(path, file, f"{repository.repo_id}, {name}")
    return path


def get_file(
    repository: Repository,
    file: HubFile,
    revision: str | None,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """One file through the client, into `folder` or its own cache; not checked."""
    from huggingface_hub import hf_hub_download

    subject = f"{repository.repo_id}, {file.name}"
    options: dict[str, Any] = {"revision": revision, "local_dir": folder, "endpoint": endpoint()}
    if "tqdm_class" in inspect.signature(hf_hub_download).parameters:  # new in 1.0
        options["tqdm_class"] = meter_class(subject, file.size, progress)
    try:
        with quiet_client():
            found = call_hub(
                lambda: hf_hub_download(repository.repo_id, file.name, **options, **HUB_LIBRARY),
                subject,
            )
    except OSError as error:
        raise _not_written(error, folder) from None
    return Path(str(found))


def _not_written(error: OSError, folder: Path | None) -> HubError:
    hint = "; HF_HOME moves the cache of the Hub's client" if folder is None else ""
    return HubError(f"{error.filename}: cannot be written ({error.strerror}){hint}")


def pinned_file(
    address: str, size: int, sha256: str | None, announce: Callable[[str], None]
) -> Path:
    """hf://user/repo@commit/name in the client's cache, downloaded unless it is there; checked.

    `announce` hears of a download. Raises HubError, and HashMismatchError for a file of another
    size or hash, which is removed.
    """
    from huggingface_hub import try_to_load_from_cache

    repo_id, _, place = address.removeprefix("hf://").partition("@")
    commit, _, name = place.partition("/")
    file = HubFile(name=name, size=size, sha256=sha256, blob_id=None)
    if not isinstance(try_to_load_from_cache(repo_id, name, revision=commit), str):
        announce(f"downloading {repo_id} ({size / 1e6:,.0f} MB) to the cache of the Hub's client")
    repository = Repository(repo_id=repo_id, commit=commit, private=False, files=(file,))
    path = get_file(repository, file, commit)
    check_file(path, file, f"{repo_id}, {name}")
    return path


def check_file(path: Path, file: HubFile, subject: str) -> None:
    """Remove and refuse a file whose size or hash is not the listed one (HashMismatchError)."""
    size = path.stat().st_size
    problem = None
    if file.size is not None and size != file.size:
        problem = f"has {size} bytes, the repository lists {file.size}"
    elif file.sha256 is not None and (digest := sha256_file(path)) != file.sha256:
        problem = f"has the SHA-256 {digest}, the repository lists {file.sha256}"
    elif file.sha256 is None and file.blob_id is not None and _blob_id(path) != file.blob_id:
        problem = f"is not the one the repository lists ({file.blob_id})"
    if problem:
        # In the client's cache the name is a link: the bytes behind it have to go as well.
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise HashMismatchError(f"{subject}: the file that came {problem}")


def _hub_file(repo_id: str, sibling: Any) -> HubFile:
    name, lfs = sibling.rfilename, sibling.lfs
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or ":" in name:
        raise HubError(f"{repo_id}: the repository lists a file outside of its folder: {name!r}")
    sha256 = getattr(lfs, "sha256", None)
    return HubFile(name=name, size=sibling.size, sha256=sha256, blob_id=sibling.blob_id)


def _blob_id(path: Path) -> str:
    """Git's name for a file that is stored as it is."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
