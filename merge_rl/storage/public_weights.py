"""Weights that others publish and that are fetched on first use, pinned: name -> address, hash.

They are kept under `$XDG_CACHE_HOME/merge_rl/weights`, by default below `~/.cache`, and checked
against their hash at every use.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from merge_rl.errors import UnknownNameError
from merge_rl.storage.download import Downloaded, download
from merge_rl.storage.hashing import sha256_file

_HUB: Final = "https://huggingface.co"


@dataclass(frozen=True, kw_only=True)
class PublicFile:
    """A file that others publish."""

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
    "facebook/dinov2-large": PublicFile(
        url=f"{_HUB}/facebook/dinov2-large/resolve/47b73eefe95e8d44ec3623f8890bd894b6ea2d6c/"
        "model.safetensors",
        size=1_217_522_888,
        sha256="399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
    ),
    "stabilityai/sd-vae-ft-mse": PublicFile(
        url=f"{_HUB}/stabilityai/sd-vae-ft-mse/resolve/31f26fdeee1355a5c34592e401dd41e45d25a493/"
        "diffusion_pytorch_model.safetensors",
        size=334_643_276,
        sha256="a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
    ),
    "stabilityai/sd-vae-ft-ema": PublicFile(
        url=f"{_HUB}/stabilityai/sd-vae-ft-ema/resolve/f04b2c4b98319346dad8c65879f680b1997b204a/"
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

    `announce` is called with a sentence before a download. Raises UnknownNameError, DownloadError,
    and HashMismatchError for a file that is not the pinned one.
    """
    if name not in files:
        raise UnknownNameError("public weights", name, files)
    file = files[name]
    target = cache_folder() / name.replace("/", "--") / file.url.rpartition("/")[2]
    present = target.is_file() and target.stat().st_size == file.size
    if present and file.sha256 is None:
        return Downloaded(path=target, size=file.size, sha256=sha256_file(target), resumed=0)
    if not present:
        announce(f"downloading {name} ({file.size / 1e6:,.0f} MB) to {target}")
    return download(file.url, target, size=file.size, sha256=file.sha256)


def cache_folder() -> Path:
    """Where fetched weights are kept; the folder need not exist."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: relative paths are to be ignored.
    root = Path(given) if given and Path(given).is_absolute() else Path.home() / ".cache"
    return root / "merge_rl" / "weights"
