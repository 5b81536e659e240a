"""Options of the command line to a config."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_rl.config import AUTO_BATCH, OptimizeConfig, from_mapping, load_mapping
from merge_rl.errors import ConfigError


def build_config(
    checkpoints: Path,
    file: Path | None,
    given: Mapping[str, Any],
    *,
    groups: Sequence[str] = (),
    overrides: Sequence[str] = (),
    sampler: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
) -> OptimizeConfig:
    """Defaults, then a `base`, the YAML file, options, and KEY=VALUE overrides.

    `given` maps dotted keys to values; None means that the option was not used. `sampler` holds
    the checkpoint set's own sampler settings, which single options change one by one.
    """
    values = overlaid(base or {}, load_mapping(file) if file else {})
    values["checkpoints"] = str(checkpoints)
    for key, value in given.items():
        if value is not None:
            if isinstance(value, dict) and isinstance(values.get(key), Mapping):
                value = {**values[key], **value}  # an option adds to the file's
            set_dotted(values, key, str(value) if isinstance(value, Path) else value)
    if groups:
        set_dotted(values, "merge.groups", dict(split_pair(pair) for pair in groups))
    for pair in overrides:
        override(values, pair)
    if isinstance(values.get("sampler"), dict):
        values["sampler"] = {**(sampler or {}), **values["sampler"]}
    if values.get("batch") == "auto":
        values["batch"] = AUTO_BATCH
    return from_mapping(OptimizeConfig, values)


def split_pair(pair: str) -> tuple[str, str]:
    """KEY=VALUE -> (KEY, VALUE)."""
    key, separator, value = pair.partition("=")
    if not separator or not key:
        raise ConfigError(f"expected NAME=VALUE, got {pair!r}")
    return key, value


def split_named(option: str, given: Sequence[str]) -> tuple[str | None, dict[str, str] | None]:
    """Values of a repeatable option, PATH or NAME=PATH: the one path, and the paths by name.

    Nothing given is None. A path that exists is a path, whatever characters it has.
    """
    plain, named = [], {}
    for text in given:
        name, separator, path = text.partition("=")
        if separator and path and re.fullmatch(r"[\w.:-]+", name) and not Path(text).exists():
            named[name] = path
        else:
            plain.append(text)
    if len(plain) > 1:
        raise ConfigError(
            f"expected one {option} without NAME=, got {len(plain)}: {', '.join(plain)}"
        )
    return plain[0] if plain else None, named or None


def overlaid(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The one with all that the other says instead; mappings key by key."""
    values = dict(under)
    for key, value in over.items():
        old = values.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = overlaid(old, value)
        values[key] = value
    return values


def override(values: dict[str, Any], pair: str) -> None:
    """Set what --set KEY=VALUE says, with the value read as YAML."""
    import yaml  # help texts come without it

    key, text = split_pair(pair)
    try:
        set_dotted(values, key, yaml.safe_load(text))
    except yaml.YAMLError:
        raise ConfigError(f"--set {pair}: the value is not valid YAML") from None


def set_dotted(values: dict[str, Any], key: str, value: object) -> None:
    """Set values["a"]["b"] for the key "a.b", making mappings on the way."""
    *path, last = key.split(".")
    for part in path:
        nested = values.get(part)
        nested = dict(nested) if isinstance(nested, Mapping) else {}
        values[part] = nested
        values = nested
    values[last] = value
