"""Modules that were pickled whole: the tensors of their parts by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Final, TypeGuard

from merge_rl.errors import CheckpointError
from merge_rl.storage.pickles.machine import Record
from merge_rl.storage.pickles.values import kind_of, shown

_MAX_NAME: Final = 500  # characters


def is_module(value: object) -> TypeGuard[Record]:
    """Whether a value has the state of a torch module, of whatever class."""
    state = value.state if isinstance(value, Record) else None
    return isinstance(state, dict) and {"_parameters", "_buffers", "_modules"} <= state.keys()


def tensors_of_module(module: Record, path: Path, most: int) -> dict[str, object]:
    """Name -> tensor of a module: its parameters, its buffers, then those of its submodules.

    They are at most `most` + 1, so that a caller can refuse more than `most`. Raises
    CheckpointError, with the file's `path`, for what has not the state of a module.
    """
    return dict(islice(_walk(module, "", path), most + 1))


def _walk(module: Record, prefix: str, path: Path) -> Iterator[tuple[str, object]]:
    state = module.state
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: the module {shown(prefix) or 'ema'} has no content")
    hidden = state.get("_non_persistent_buffers_set")
    left_out = hidden if isinstance(hidden, (set, frozenset)) else frozenset()
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, value in _part(state, kind, path).items():
            # Checked on the way: long names of nested modules would add up beyond the file.
            if len(prefix) + len(name) > _MAX_NAME:
                raise CheckpointError(f"{path}: a tensor's name of over {_MAX_NAME} characters")
            if value is None or (kind == "_buffers" and name in left_out):
                continue
            if kind != "_modules":
                yield f"{prefix}{name}", value
            elif isinstance(value, Record):
                yield from _walk(value, f"{prefix}{name}.", path)
            else:
                raise CheckpointError(f"{path}: submodule {shown(name)} is {kind_of(value)}")


def _part(state: Mapping[object, object], kind: str, path: Path) -> dict[str, object]:
    part = state.get(kind)
    if not isinstance(part, dict) or not all(isinstance(name, str) for name in part):
        raise CheckpointError(f"{path}: a module whose {kind} are {kind_of(part)}")
    return part
