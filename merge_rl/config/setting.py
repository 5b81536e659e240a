"""What a setting says of itself, written once, where the field is: meaning, option, default.

The command line, `mergerl settings` and the documentation's page are made of it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from merge_rl.errors import ConfigError, UnknownNameError

T = TypeVar("T")

# Rules of a run, which are those of the release it began with: runs go on by them. The first had
# image seeds of 32 bits, finalists of all rounds, and fine-tuning without a gradient through steps
# that draw nothing; the second had steps along gradients whose length did not find itself.
FIRST_RULES, FIXED_STEP_RULES = 1, 2
RULES: Final = 3

ABOUT: Final = "about"  # key of a field's metadata
GENERAL, SEARCH, LEARN, REWARD = "", "Search", "Rollouts and updates", "Reward"
DATA, MODEL, SCORES, RUN = "Real data", "Model and sampling", "Scores", "The run"
# As --help shows them.
PANELS: Final = (GENERAL, SEARCH, LEARN, REWARD, DATA, MODEL, SCORES, RUN)


@dataclass(frozen=True, kw_only=True)
class About:
    """What a field says of itself; `settings_of` reads it."""

    help: str
    panel: str = GENERAL
    flag: str | None = None  # option; without one a setting is reached by --set and files
    metavar: str | None = None
    unset: str | None = None  # where the default lies elsewhere: what stands in for it
    choices: tuple[str, ...] = ()  # all there are; `require_choices` checks them
    # What may be said in place of a number, and the number that it stands for.
    words: Mapping[str, int] = field(default_factory=dict)
    path: bool = False  # a file or folder
    named: str | None = None  # field that takes what the option's values say as NAME=PATH


def about(**said: Any) -> Mapping[str, About]:
    """Metadata of a field without a plain default."""
    return {ABOUT: About(**said)}


def setting(default: T, help: str, panel: str = GENERAL, flag: str | None = None, **more: Any) -> T:
    """A field of a dataclass of settings: its default, and what `About` holds."""
    found: T = field(default=default, metadata=about(help=help, panel=panel, flag=flag, **more))
    return found


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting as it is seen from outside."""

    key: str  # dotted, as in files and for --set
    kind: Any  # type of the value; of what may be None, the type of the others
    default: Any  # None also where it lies elsewhere
    shown: str  # the default in words; empty: there is none
    about: About

    @property
    def type_name(self) -> str:
        """Such as "int" or "list of str"."""
        origin, parts = typing.get_origin(self.kind), typing.get_args(self.kind)
        if origin is tuple:
            return f"list of {parts[0].__name__}"
        return self.kind.__name__ if origin is None else "mapping"


def settings_of(cls: type, *, prefix: str = "", defaults: Any = None) -> Iterator[Setting]:
    """Every setting of a dataclass, those of nested ones after dots, in the order of the fields.

    `defaults` is an instance whose values count as defaults instead of the fields' own.
    """
    kinds = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        said, kind = item.metadata.get(ABOUT), _without_none(kinds[item.name])
        default = _default(item) if defaults is None else getattr(defaults, item.name)
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            below = settings_of(kind, prefix=f"{prefix}{item.name}.", defaults=default)
            # A part that may be left out is that of the set, or its own defaults.
            yield from map(_elsewhere, below) if default is None else below
        elif said is not None:
            shown = default_text(default) or said.unset or ""
            yield Setting(
                key=f"{prefix}{item.name}", kind=kind, default=default, shown=shown, about=said
            )


def _elsewhere(own: Setting) -> Setting:
    shown = f"that of the set, or {own.shown}" if own.shown else "that of the set"
    return dataclasses.replace(own, default=None, shown=shown)


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return None if item.default is dataclasses.MISSING else item.default


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def at_home(value: Any) -> Any:
    """A value of a file or of the command line, with the user's folder for `~/` at its begin.

    A shell puts it there itself, but not behind `--option=` or `key=`.
    """
    if isinstance(value, dict):
        return {key: at_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [at_home(item) for item in value]
    if not isinstance(value, str):
        return value
    before = re.match(r"(?:(?:--)?[a-z][\w.-]*=)?(?=~/)", value)
    if before is None:
        return value
    # Where no home is known the text stays: a Path would raise.
    return before[0] + os.path.expanduser(value[before.end() :])  # noqa: PTH111


def default_text(value: Any) -> str:
    """A default in words, as one would type it; empty for what says nothing."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value) if value not in (None, {}) else ""


def require_rules(rules: int) -> None:
    """Raise ConfigError for rules that this release does not know."""
    if not FIRST_RULES <= rules <= RULES:
        raise ConfigError(
            f"expected rules of a run in {FIRST_RULES}..{RULES}, got {rules}: it began with "
            "another release"
        )


def require_choices(config: Any) -> None:
    """Raise UnknownNameError for a value that is not among the choices of its field."""
    for item in dataclasses.fields(config):
        said = item.metadata.get(ABOUT)
        value = getattr(config, item.name)
        if said is None or not said.choices or value is None:
            continue
        for name in value if isinstance(value, tuple) else (value,):
            if name not in said.choices:
                raise UnknownNameError(item.name, str(name), said.choices)
