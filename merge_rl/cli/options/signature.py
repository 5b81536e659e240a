"""The signature of a command from a dataclass of settings, and the way back to what was said."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, Final, get_args

import typer
from rich.markup import escape

from merge_rl.cli.options.layers import (
    SHORTHANDS,
    Former,
    Shorthand,
    former_names,
    layered,
    values_of,
)
from merge_rl.config import (
    EXAMPLES,
    PANELS,
    PRESETS,
    Setting,
    real_number,
    settings_of,
    whole_number,
)
from merge_rl.errors import ConfigError

# The parameter of a command's function that receives what was said about settings.
SETTINGS: Final = "settings"
FILE, PRESET, PAIRS = "said_in_file", "said_by_preset", "said_in_pairs"
WIDEST_METAVAR: Final = 18  # choices that need more room go to the help text


@dataclass(frozen=True, kw_only=True)
class Offer:
    """The settings of a command, and which of them have no option there."""

    command: str
    cls: type
    without: tuple[str, ...] = ()  # dotted keys, or what they begin with
    presets: bool = False

    def settings(self) -> list[Setting]:
        """All of them; those without an option are reached by --set and files."""
        return list(_all_settings(self.cls))

    def flag(self, setting: Setting) -> str | None:
        """The option of a setting, if this command has it."""
        return setting.about.flag if self.offers(setting.key) else None

    def offers(self, key: str) -> bool:
        """Whether options may say this setting."""
        return not any(key == out or key.startswith(f"{out}.") for out in self.without)

    def options(self) -> list[Setting]:
        """Settings with an option, a panel after the other."""
        found = [setting for setting in self.settings() if self.flag(setting)]
        return sorted(found, key=lambda setting: PANELS.index(setting.about.panel))

    def shorthands(self) -> list[Shorthand]:
        """Options for several settings at once."""
        keys = {setting.key for setting in self.settings()}
        return [short for short in SHORTHANDS if short.key in keys and self.offers(short.key)]


@functools.cache
def _all_settings(cls: type) -> tuple[Setting, ...]:
    return tuple(settings_of(cls))


COMMANDS: Final[dict[str, Offer]] = {}  # filled by `with_settings`


def with_settings(
    cls: type, *, without: Iterable[str] = (), presets: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: the command also takes an option for every setting of `cls` that has a flag.

    The function keeps its own arguments and gets what was said about settings (by a preset, a file,
    options, former names of them, --set) as one nested mapping, its argument `settings`.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__
        offer = Offer(command=name, cls=cls, without=tuple(without), presets=presets)
        own = dict(inspect.signature(function, eval_str=True).parameters)
        parameters = [*parameters_of(own.values(), offer)]
        parameters += [_hidden(former, parameters) for former in former_names(name)]

        @functools.wraps(function)
        def command(context: typer.Context, **given: Any) -> None:
            typed = {key: value for key, value in given.items() if _was_typed(context, key)}
            _renew(former_names(name), typed, parameters)
            values = {key: typed.get(key, given[key]) for key in own if key != SETTINGS}
            function(**values, settings=what_was_said(offer, typed))

        parameters.insert(0, _keyword("context", typer.Context))
        vars(command)["__signature__"] = inspect.Signature(parameters)
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        COMMANDS[name] = offer
        return command

    return decorate


def parameters_of(own: Iterable[Parameter], offer: Offer) -> Iterator[Parameter]:
    """A command's parameters: its own ones, with the settings' in place of `settings`."""
    for parameter in own:
        if parameter.name != SETTINGS:
            yield parameter.replace(kind=Parameter.KEYWORD_ONLY)
            continue
        file = typer.Option("--config", help="YAML file of settings; options override it.")
        yield _keyword(FILE, Annotated[Path | None, file], None)
        if offer.presets:
            known = (
                f"Settings by name, under all others: {', '.join(PRESETS)} (as published; it can "
                "end worse than its start)."
            )
            yield _keyword(
                PRESET, Annotated[str | None, typer.Option("--preset", help=known)], None
            )
        pair = f"Any setting by its key; mergerl settings {offer.command} lists them."
        option = typer.Option("--set", metavar="KEY=VALUE", help=pair)
        yield _keyword(PAIRS, Annotated[list[str] | None, option], None)
        yield from map(_parameter, offer.options())
        yield from map(_short, offer.shorthands())


def what_was_said(offer: Offer, typed: Mapping[str, Any]) -> dict[str, Any]:
    """The nested mapping of settings, from the values of the parameters that were typed."""
    known = {setting.key for setting in offer.settings() if offer.offers(setting.key)}
    given: dict[str, Any] = {}
    for setting in offer.options():
        if _name(setting.key) in typed:
            given |= values_of(setting, typed[_name(setting.key)])
    layers = functools.partial(
        layered, file=typed.get(FILE), under=typed.get(PRESET), overrides=typed.get(PAIRS) or ()
    )
    said, meant = layers(given), dict[str, Any]()
    for short in offer.shorthands():
        if _name(short.flag) in typed:
            meant |= short.meaning(typed[_name(short.flag)], str(said.get("device") or "cpu"))
    meant = {key: value for key, value in meant.items() if key in known}
    return layers(meant | given) if meant else said


def _parameter(setting: Setting) -> Parameter:
    about, kind, default = setting.about, setting.kind, setting.default
    if about.named or setting.type_name not in ("int", "float", "str", "bool"):
        kind, default = list[str], None
    elif about.words or about.path:
        kind, default = Path if about.path else str, None if default is None else str(default)
    metavar, text = about.metavar, about.help
    if about.choices:
        listed = "|".join(about.choices)
        if len(listed) <= WIDEST_METAVAR:
            metavar = listed
        elif any(choice not in text for choice in about.choices):
            text += f" One of {', '.join(about.choices)}."
    option = typer.Option(
        about.flag, help=escape(text), metavar=metavar, rich_help_panel=about.panel or None,
        show_default=default is not None or setting.shown or False, parser=NUMBERS.get(kind),
    )  # fmt: skip
    if kind is bool:
        return _keyword(_name(setting.key), Annotated[bool, option], False)
    return _keyword(_name(setting.key), Annotated[kind | None, option], default)


def integer(text: object) -> int:
    """The number of an option."""
    number = whole_number(text)
    if number is None:
        raise typer.BadParameter(f"{text!r} is not a valid integer, such as {EXAMPLES}.")
    return number


def decimal(text: object) -> float:
    """The number of an option."""
    number = real_number(text)
    if number is None:
        raise typer.BadParameter(f"{text!r} is not a valid float, such as 0.05 or 5e-2.")
    return number


def positive(text: object) -> int:
    """The number of an option, 1 at least."""
    number = integer(text)
    if number < 1:
        raise typer.BadParameter(f"{text!r} is not a whole number of 1 or more.")
    return number


NUMBERS: Final[dict[Any, Callable[[object], Any]]] = {int: integer, float: decimal}


def _short(short: Shorthand) -> Parameter:
    option = typer.Option(
        short.flag, help=short.help, metavar=short.metavar, rich_help_panel=short.panel
    )
    if short.kind is bool:
        return _keyword(_name(short.flag), Annotated[bool, option], False)
    return _keyword(_name(short.flag), Annotated[short.kind | None, option], None)


def _hidden(former: Former, parameters: Iterable[Parameter]) -> Parameter:
    kind = get_args(_having(former.new, parameters).annotation)[0]
    option = typer.Option(former.old, hidden=True, parser=NUMBERS.get(_without_none(kind)))
    return _keyword(_name(former.old), Annotated[kind, option], None)


def _renew(names: Iterable[Former], typed: dict[str, Any], parameters: Iterable[Parameter]) -> None:
    """Move values from former names to the present ones."""
    for former in names:
        if _name(former.old) not in typed:
            continue
        former.tell()
        present = _having(former.new, parameters).name
        value = former.renewed(typed.pop(_name(former.old)))
        if present not in typed:
            typed[present] = value
        elif isinstance(value, list):
            typed[present] = [*value, *typed[present]]
        else:
            raise ConfigError(f"{former.old} is {former.new} now; expected one of the two")


def _without_none(kind: Any) -> Any:
    return next((part for part in get_args(kind) if part is not type(None)), kind)


def _having(flag: str, parameters: Iterable[Parameter]) -> Parameter:
    """The parameter of an option."""
    for parameter in parameters:
        for item in get_args(parameter.annotation)[1:]:
            # Within Annotated the first name stands where a default would.
            if flag in (item.default, *(item.param_decls or ()), f"--{parameter.name}"):
                return parameter
    raise LookupError(flag)


def _keyword(name: str, annotation: Any, default: Any = Parameter.empty) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _name(text: str) -> str:
    """A parameter for a key or an option; no argument of a command's own begins so."""
    return "said_" + text.strip("-").replace(".", "__").replace("-", "_")


def _was_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and not source.name.startswith("DEFAULT")
