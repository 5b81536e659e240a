"""Settings to and from plain mappings and YAML: strict about names, types and ranges.

Mappings come in layers that lie over each other: a recipe of the package, a file, KEY=VALUE pairs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from merge_rl.config.numbers import real_number, whole_number
from merge_rl.config.sampler import OWN, PATH_NAMES
from merge_rl.config.setting import ABOUT, at_home
from merge_rl.errors import ConfigError, UnknownNameError

T = TypeVar("T")
RECIPES = Path(__file__).parents[1] / "data" / "recipes"


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes, sorted."""
    return tuple(sorted(path.stem for path in RECIPES.glob("*.yaml")))


def find_settings(path: Path) -> Path:
    """The file that `path` stands for: itself, or the recipe of that name where there is no file.

    A bare name without an ending can only be a recipe: UnknownNameError lists them for any other.
    """
    there = path.exists() and not path.is_dir()  # the demo is a folder named as its recipe
    if there or path.suffix or len(path.parts) != 1:
        return path
    if path.name not in recipe_names():
        raise UnknownNameError("file or recipe of settings", str(path), recipe_names())
    return RECIPES / f"{path.name}.yaml"


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
        raise ConfigError(f"{where}: expected a mapping, found {_found(values)}")
    kinds, taken = _kinds(cls), _words(cls)  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        if key not in kinds:
            deeper = [f"{name}.{key}" for name, kind in kinds.items() if key in _within(kind)]
            raise UnknownNameError(f"setting in {where}", str(key), kinds, nearest=deeper or None)
        words = taken.get(key, {})
        if isinstance(value, str) and value in words:
            arguments[key] = words[value]
        else:
            arguments[key] = _convert(kinds[key], value, f"{where}.{key}", *words)
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


@functools.cache
def _kinds(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@functools.cache
def _words(cls: type) -> dict[str, Mapping[str, int]]:
    """By field, what may be said in place of its number."""
    said = {item.name: item.metadata.get(ABOUT) for item in dataclasses.fields(cls)}
    return {name: about.words for name, about in said.items() if about is not None and about.words}


def _within(kind: Any) -> Mapping[str, Any]:
    """The settings of a section, also of one that may be left out; none of another kind."""
    section = next((part for part in typing.get_args(kind) or (kind,) if part is not None), kind)
    return _kinds(section) if dataclasses.is_dataclass(section) else {}  # type: ignore[arg-type]


def _found(value: object) -> str:
    """What a value is, for a sentence that says what was found."""
    return "nothing" if value is None else type(value).__name__


def load_mapping(path: Path) -> dict[str, Any]:
    """A YAML file, or the recipe of that name, that must hold a mapping with text keys."""
    # Help texts need the settings' names, and must not wait for what reads YAML.
    from merge_rl.untrusted import load_yaml

    values = load_yaml(find_settings(path), ConfigError)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping, found {_found(values)}")
    return {str(key): at_home(value) for key, value in values.items()}


def load_config(cls: type[T], path: Path, **unsaid: Any) -> T:
    """Read a YAML file into a config; `unsaid` are values of what it does not say."""
    return from_mapping(cls, unsaid | load_mapping(path), path.name)


def dump_config(config: Any) -> str:
    """A config as YAML text that `load_config` reads back to an equal config."""
    return yaml_text(to_mapping(config))


def yaml_text(value: object, width: int = 80) -> str:
    """Plain data as YAML, keys in the order given; ConfigError for names that YAML cannot hold.

    The bytes of a file's name need not be text; Python stands halves of characters for them.
    """
    import yaml

    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml, where it is built in
    try:
        text: str = yaml.dump(
            value, Dumper=dumper, sort_keys=False, allow_unicode=True, width=width
        )
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{error.object}: cannot be recorded, as its name holds bytes that are no text; "
            "expected UTF-8, so rename it"
        ) from None
    return text


def _convert(kind: Any, value: object, where: str, *words: str) -> Any:
    """A plain value as one of the kind; `words` could have stood in its place."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in parts:
            return None
        return _convert(next(p for p in parts if p is not type(None)), value, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return from_mapping(kind, value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(parts[0], item, where) for item in value)
    if origin not in (None, tuple) and isinstance(value, Mapping):
        return {str(k): _convert(parts[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind in (int, float):
        number = whole_number(value) if kind is int else real_number(value)
        if number is not None:
            return number
        if kind is int and type(value) is int:
            expected = "a whole number within 64 bits"
            raise ConfigError(f"{where}: expected {expected}, found {value!r:.60}")
    elif kind is str and type(value) is int:
        return str(value)
    elif isinstance(kind, type) and type(value) is kind:
        return value
    name = getattr(kind, "__name__", str(kind))
    if origin is not None:  # tuples, which are lists in files, or mappings by name
        part = getattr(parts[-1 if origin is not tuple else 0], "__name__", "value")
        name = f"a list of {part}" if origin is tuple else f"a mapping of names to {part}"
    shown = "" if value is None else f" {value!r:.60}"
    name = " or ".join((name, *words))
    raise ConfigError(f"{where}: expected {name}, found {_found(value)}{shown}")


def without_nan(value: Any) -> Any:
    """Plain data with None for NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def finite(value: Any) -> Any:
    """Settings as JSON takes them: the infinite ones as text, which `from_mapping` reads back."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


SAME_PATHS: Final = {PATH_NAMES[0], OWN}


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys; an empty one stays as it is."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted names of what two documents of settings say unlike, with the value in each.

    A path "linear" and "own" are alike: where linear was accepted, it is what the network states.
    """
    old, new = flattened(before), flattened(now)
    pairs = {key: (old.get(key), new.get(key)) for key in {**old, **new}}
    return {
        key: pair for key, pair in pairs.items()
        if pair[0] != pair[1] and not (key.endswith("sampler.path") and set(pair) <= SAME_PATHS)
    }  # fmt: skip


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
