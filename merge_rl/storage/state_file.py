"""A resume point: one safetensors file of tensors and, in its header, of plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from merge_rl.errors import CheckpointError, RunError
from merge_rl.storage.atomic import save_tensors
from merge_rl.storage.safetensors_file import read_file

State = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and plain values."""


def write_state(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write a resume point, or replace the one that is there: whole or not at all."""
    save_tensors(path, dict(tensors), {"state": json.dumps(dict(values))})


def read_state(path: Path) -> State:
    """A resume point; RunError names a file that is damaged or something else."""
    try:
        header, tensors, _ = read_file(path, hashed=False)
        return tensors, json.loads(header.metadata["state"])
    except KeyError:
        reason = "its header holds no state"
    except (CheckpointError, json.JSONDecodeError) as error:
        reason = str(error).removeprefix(f"{path}: ")
    raise RunError(f"{path}: damaged resume point: {reason}")
