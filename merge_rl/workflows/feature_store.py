"""Features of an evaluation on disk: finished blocks, and the pieces of one that was cut short."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merge_rl.errors import RunError
from merge_rl.storage.features_file import SavedFeatures, load_features, save_features
from merge_rl.storage.safetensors_file import tensor_bytes
from merge_rl.storage.work_folder import WorkFolder


class FeatureStore:
    """Blocks of features in a folder, each under a name and a key: all that it depends on.

    A block that is there already is taken as it is; under another key it is refused, as it belongs
    to another evaluation.
    """

    def __init__(
        self, folder: Path, *, extractor: str, sha256: str | None, key: Mapping[str, Any]
    ) -> None:
        self.folder, self._key = folder, dict(key)
        self._blank = SavedFeatures(
            features=torch.empty(0, 1), extractor=extractor, extractor_sha256=sha256
        )

    def file(self, name: str) -> Path:
        """Where a block of this name lies."""
        return self.folder / f"{name}.safetensors"

    def load(self, name: str, key: Mapping[str, Any]) -> Tensor | None:
        """Features (N, D) of a finished block; None if it is not finished."""
        file = self.file(name)
        if not file.exists():
            return None
        saved, expected = load_features(file), self._settings(key)
        for what, value in expected.items():
            found = saved.settings.get(what)
            if found != value:
                raise RunError(
                    f"{file} belongs to another evaluation: its {what} is {found}, expected "
                    f"{value}; choose another folder"
                )
        return saved.features

    def save(
        self, name: str, key: Mapping[str, Any], features: Tensor, labels: Tensor | None = None
    ) -> None:
        """A block is finished; its pieces go."""
        saved = dataclasses.replace(
            self._blank, features=features, labels=labels, settings=self._settings(key)
        )
        save_features(self.file(name), saved)
        self.pieces(name, key).remove()

    def pieces(self, name: str, key: Mapping[str, Any]) -> WorkFolder:
        """The pieces of an unfinished block."""
        return WorkFolder(self.file(name), self._settings(key))

    def _settings(self, key: Mapping[str, Any]) -> dict[str, str]:
        return {
            name: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
            for name, value in {**self._key, **key}.items()
        }


def weights_digest(part: object) -> str:
    """SHA-256 of a network's names, shapes and values; the type's name for what holds none."""
    digest = hashlib.sha256(type(part).__name__.encode())
    if isinstance(part, nn.Module):
        for name, tensor in part.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
