"""Tensors held against the network that a config builds: names, shapes, floating types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merge_rl import registry
from merge_rl.core.wrapped import unwrapped
from merge_rl.errors import ConfigError, IncompatibleCheckpointError
from merge_rl.storage.files import TensorInfo

Config = Mapping[str, Any]


def require_network(tensors: Mapping[str, TensorInfo], config: Config | None, where: str) -> None:
    """Refuse tensors that are not those of the network that `config` describes.

    The network is built on the meta device, without memory for weights. Nothing is said where no
    config is known, or one that names no network of ours ("model" is missing). Raises
    IncompatibleCheckpointError that counts the odd tensors and describes the first.
    """
    if config is None or "model" not in config:
        return
    expected = _forms(config, len(tensors), where)
    odd = [name for name in {**expected, **tensors} if not _fits(tensors, expected, name)]
    if odd:
        wanted = expected.get(odd[0])
        kind = "a floating type" if wanted and wanted.dtype.is_floating_point else "whole numbers"
        found, want = tensors.get(odd[0], "missing"), "no such tensor"
        if wanted:
            want = f"{kind} {list(wanted.shape)}"
        wrapped = unwrapped(tensors).keys() == expected.keys() != tensors.keys()
        hint = "; `mergerl convert` takes what wraps their names off" if wrapped else ""
        raise IncompatibleCheckpointError(
            f"{where}: not the tensors of the {config['model']} network that its config describes: "
            f"{len(odd)} differ, first {odd[0]!r}: found {found}, expected {want}{hint}"
        )


def _fits(tensors: Mapping[str, TensorInfo], expected: Mapping[str, TensorInfo], name: str) -> bool:
    found, wanted = tensors.get(name), expected.get(name)
    if found is None or wanted is None or found.shape != wanted.shape:
        return False
    return found.dtype.is_floating_point == wanted.dtype.is_floating_point


def _forms(config: Config, count: int, where: str) -> dict[str, TensorInfo]:
    """The network's own state dict; one far larger than `count` tensors is not even begun."""
    parts = [value for key in ("depth", "num_blocks") if type(value := config.get(key)) is int]
    parts += [len(value) for value in config.values() if isinstance(value, (list, tuple))]
    if max(parts, default=0) > count:
        raise IncompatibleCheckpointError(
            f"{where}: {count} tensors, but its config describes a network of {max(parts)} parts"
        )
    try:
        state = registry.build_on_meta(config).state_dict()
    except ConfigError as error:
        raise IncompatibleCheckpointError(f"{where}: {error}") from None
    return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in state.items()}
