"""Settings as a call in Python says them: a config, names of settings, or both."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from merge_rl import own_code
from merge_rl.config.mapping import flattened, from_mapping, overlaid, set_dotted, to_mapping
from merge_rl.config.setting import settings_of
from merge_rl.errors import ConfigError, UnknownNameError

T = TypeVar("T")


def or_defaults(cls: type[T], config: T | None) -> T:
    """The config of a call, the defaults where there is none; ConfigError for anything else."""
    if isinstance(config, cls):
        return config
    if config is not None:
        wanted = f"a merge_rl.{cls.__name__} as config, or settings by their names"
        raise ConfigError(f"expected {wanted}, got {type(config).__name__} {config!r:.60}")
    return cls()


def with_settings(cls: type[T], config: T | None, **named: Any) -> T:
    """The config, or the defaults, with settings by their names, as a call says them.

    See `said_by`. Raises ConfigError for what the config says otherwise: neither overrules the
    other.
    """
    config = or_defaults(cls, config)
    said = said_by(cls, **named)
    before, unset = flattened(to_mapping(config)), flattened(to_mapping(cls()))
    for key, value in flattened(said).items():
        at = before.get(key)
        if at not in (unset.get(key), value):
            raise ConfigError(
                f"{key} is {value!r} in the call and {at!r} in its config; expected one of the two"
            )
    return from_mapping(cls, overlaid(to_mapping(config), said), "settings")


def said_by(cls: Any, **named: Any) -> dict[str, Any]:
    """Settings by their names, nested as in files.

    A name is that of a field, or the last part of a nested setting's key where one alone ends so:
    `pool_size` is `reward.pool_size`. A part may be given as its dataclass, as a mapping, or by its
    `name` alone (`reward="kid-subset"`, `searcher="random"`); code of the user's as an object, too.
    Raises UnknownNameError for other names, and ConfigError for one that ends several keys.
    """
    said: dict[str, Any] = {}
    for name, value in named.items():
        set_dotted(said, *_key_of(cls, name, value))
    return said


def _key_of(cls: Any, name: str, value: Any) -> tuple[str, Any]:
    """The dotted key that a name of a call means, and its value as plain data."""
    fields = {item.name for item in dataclasses.fields(cls)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = to_mapping(value)
    elif isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif name == "device" and type(value).__module__ == "torch":  # which need not be loaded here
        value = str(value)
    elif hasattr(value, "tolist"):  # a number, or numbers, of NumPy or torch
        value = value.tolist()
    elif not isinstance(value, (str, int, float, Mapping, list, tuple, type(None))):
        value = own_code.allow(value)
    name = "search" if name == "searcher" else name
    if name in fields:
        part = typing.get_type_hints(cls)[name]
        return (f"{name}.name" if isinstance(value, str) and _has_name(part) else name), value
    keys = [setting.key for setting in settings_of(cls)]
    ends = [key for key in keys if key.rpartition(".")[2] == name]
    if not ends:
        known = {*fields, "searcher", *(key.rpartition(".")[2] for key in keys)}
        flag = f"--{name.replace('_', '-')}"  # its option may have another name
        nearest = [s.key.rpartition(".")[2] for s in settings_of(cls) if s.about.flag == flag]
        raise UnknownNameError("setting", name, known, nearest=nearest or None)
    if len(ends) > 1:
        parts = " or ".join(f"{key.partition('.')[0]}={{{name!r}: ...}}" for key in ends)
        raise ConfigError(f"the setting {name!r} is one of {', '.join(ends)}; say {parts}")
    return ends[0], value


def _has_name(part: Any) -> bool:
    return dataclasses.is_dataclass(part) and any(
        f.name == "name" for f in dataclasses.fields(part)
    )
