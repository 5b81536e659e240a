"""Settings in layers: mappings laid over each other, KEY=VALUE pairs, dotted keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merge_rl.errors import ConfigError


def split_pair(pair: str) -> tuple[str, str]:
    """KEY=VALUE -> (KEY, VALUE)."""
    key, separator, value = pair.partition("=")
    if not separator or not key:
        raise ConfigError(f"expected NAME=VALUE, got {pair!r}")
    return key, value


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
    from merge_rl.untrusted import parse_yaml  # help texts come without it

    key, text = split_pair(pair)
    set_dotted(values, key, parse_yaml(text, f"--set {pair}", ConfigError))


def set_dotted(values: dict[str, Any], key: str, value: object) -> None:
    """Set values["a"]["b"] for the key "a.b", making mappings on the way."""
    *path, last = key.split(".")
    for part in path:
        nested = values.get(part)
        nested = dict(nested) if isinstance(nested, Mapping) else {}
        values[part] = nested
        values = nested
    values[last] = value
