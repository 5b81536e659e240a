"""What an interrupted job has done so far, beside its output, until that is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from merge_rl.errors import CheckpointError, RunError
from merge_rl.storage.atomic import save_tensors, write_json
from merge_rl.storage.safetensors_file import read_file

KEY_NAME: Final = "key.json"


class WorkFolder:
    """Files of one unfinished job, kept under a key: everything that its result depends on.

    The folder, hidden, appears with the first file.
    What lies there under another key is of no use and is removed on opening.
    """

    def __init__(self, output: Path, key: Mapping[str, Any]) -> None:
        self.path = output.with_name(f".{output.name}.partial")
        self._key = json.loads(json.dumps(dict(key)))
        if self.path.exists() and not self._is_ours():
            raise RunError(f"{self.path} is in the way; expected the unfinished work of this job")
        if self.path.exists() and self._recorded() != self._key:
            shutil.rmtree(self.path)

    def write(self, name: str, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
        """Replace a file of tensors and a note of plain data, atomically."""
        if not self.path.exists():
            self.path.mkdir(parents=True)
            write_json(self.path / KEY_NAME, self._key)
        save_tensors(self.path / f"{name}.safetensors", tensors, {"note": json.dumps(dict(note))})

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was written under that name; None if nothing was, or if it is damaged."""
        file = self.path / f"{name}.safetensors"
        if not file.is_file():
            return None
        try:
            header, tensors, _ = read_file(file, hashed=False)
            return tensors, json.loads(header.metadata["note"])
        except (CheckpointError, KeyError, json.JSONDecodeError):
            return None

    def remove(self) -> None:
        """The job is done."""
        if self.path.exists():
            shutil.rmtree(self.path)

    def _is_ours(self) -> bool:
        return self.path.is_dir() and (
            (self.path / KEY_NAME).is_file() or not any(self.path.iterdir())
        )

    def _recorded(self) -> object:
        try:
            return json.loads((self.path / KEY_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
