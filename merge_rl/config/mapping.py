"""Settings to and from plain mappings and YAML: strict about names, types and ranges.

Code below this package trusts the values. Every default is what the command does when nothing is
said.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from merge_rl.config.numbers import real_number, whole_number
from merge_rl.config.recipes import find_settings
from merge_rl.errors import ConfigError, UnknownNameError

T = TypeVar("T")


def to_mapping(config: Any) -> dict[str, Any]:
    """A config as plain mappings, lists, numbers and strings."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            value = to_mapping(value)
        elif isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, Mapping):
            value = dict(value)
        values[item.name] = value
    return values


def from_mapping(cls: type[T], values: object, where: str = "config") -> T:
    """A config of type `cls` from plain mappings; ConfigError names the key that is off."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping, found {type(values).__name__}")
    kinds = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in kinds:
            raise UnknownNameError(f"setting in {where}", str(key), kinds)
        arguments[key] = _convert(kinds[key], value, f"{where}.{key}")
    missing = [
        item.name
        for item in dataclasses.fields(cls)  # type: ignore[arg-type]
        if item.name not in arguments
        and item.default is dataclasses.MISSING
        and item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: {missing[0]!r} is missing")
    return cls(**arguments)


def load_mapping(path: Path) -> dict[str, Any]:
    """A YAML file, or the recipe of that name, that must hold a mapping with text keys."""
    # Help texts need the settings' names, and must not wait for what reads YAML.
    from merge_rl.untrusted import load_yaml

    values = load_yaml(find_settings(path), ConfigError)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping, found {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def load_config(cls: type[T], path: Path) -> T:
    """Read a YAML file into a config."""
    return from_mapping(cls, load_mapping(path), path.name)


def dump_config(config: Any) -> str:
    """A config as YAML text that `load_config` reads back to an equal config."""
    import yaml

    text: str = yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True)
    return text


def _convert(kind: Any, value: object, where: str) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in parts:
            return None
        return _convert(next(p for p in parts if p is not type(None)), value, where)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return from_mapping(kind, value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(parts[0], item, where) for item in value)
    if origin is not None and isinstance(value, Mapping):
        return {str(k): _convert(parts[1], v, f"{where}.{k}") for k, v in value.items()}
    number = {int: whole_number, float: real_number}.get(kind, _no_number)(value)
    if number is not None:
        return number
    if kind is str and type(value) is int:
        return str(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    name = getattr(kind, "__name__", str(kind)) if origin is None else "list or mapping"
    raise ConfigError(f"{where}: expected {name}, found {type(value).__name__} {value!r}")


def _no_number(_value: object) -> None:
    return None


def without_nan(value: Any) -> Any:
    """Plain data with None for NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys; an empty one stays as it is."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
