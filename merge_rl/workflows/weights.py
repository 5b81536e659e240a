"""Weights of extractors and autoencoders: from a file, a folder, or public ones by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from torch import Tensor

from merge_rl.errors import CheckpointError
from merge_rl.storage.hashing import sha256_file
from merge_rl.storage.model_file import model_sha256, open_model_file
from merge_rl.storage.pickle_data import TensorRef, read_data
from merge_rl.storage.public_weights import PUBLIC_FILES, fetch_public

TORCH_SUFFIXES: Final = (".pth", ".pt", ".bin", ".ckpt")
Announce = Callable[[str], None]
"""Called with a sentence before something that takes long."""


class Weights(NamedTuple):
    """Tensors by name, the config beside them if there is one, and the file's SHA-256."""

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None
    sha256: str


def load_weights(source: str, announce: Announce = lambda _text: None) -> Weights:
    """Weights from `source`: a path, or a name of `PUBLIC_FILES` where no such path exists.

    Takes what `open_model_file` takes, and state dicts that torch.save wrote, of which data alone
    is read. Raises CheckpointError for anything else.
    """
    if is_public(source):
        fetched = fetch_public(source, announce=announce)
        return _read(fetched.path)._replace(sha256=fetched.sha256)
    return _read(Path(source))


def is_public(source: str) -> bool:
    """Whether `source` means published weights, not a file."""
    return source in PUBLIC_FILES and not Path(source).exists()


def _read(path: Path) -> Weights:
    if path.suffix.lower() in TORCH_SUFFIXES and path.is_file():
        return Weights(_state_dict(path), None, sha256_file(path))
    file = open_model_file(path)
    return Weights(file.weights, file.config, model_sha256(path))


def _state_dict(path: Path) -> dict[str, Tensor]:
    value = read_data(path)
    if not isinstance(value, dict) or not value:
        kind = "nothing" if value == {} else type(value).__name__
        raise CheckpointError(f"{path}: expected a state dict, found {kind}")
    tensors = {}
    for name, item in value.items():
        if not isinstance(name, str) or not isinstance(item, TensorRef):
            found = f"{type(item).__name__} at {str(name)[:60]!r}"
            raise CheckpointError(f"{path}: expected a state dict of tensors alone, found {found}")
        tensors[name] = item.load()
    return tensors
