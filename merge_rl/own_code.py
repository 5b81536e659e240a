"""Code of the user's own, by the name "package.module:factory".

A name in a file imports nothing by itself, as files come from anywhere: what a run, a manifest, a
model folder or a repository names is looked up where the user has allowed it in this process, by an
option or an argument that names it too, or by handing over the object.
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from merge_rl.errors import ConfigError, MergeRLError

_allowed: Final[dict[str, Any]] = {}  # name -> the object, or None: to be imported
_packages: Final[set[str]] = set()  # what was imported


def is_own(name: str) -> bool:
    """Whether a name means code of the user's: "package.module:factory"."""
    return ":" in name


def allow(code: Any) -> str:
    """Let code be used in this process, by its name or as an object; what files call it.

    Classes and functions are factories; any other object is what its factory would return.
    """
    if isinstance(code, str):
        for one in code.split(","):  # of several extractors
            _allowed.setdefault(one)
        return code
    name = name_of(code)
    _allowed[name] = code if _makes(code) else lambda *_given, **_options: code
    return name


def _makes(code: Any) -> bool:
    """Whether code is a factory by its kind: a class or a function."""
    return inspect.isclass(code) or inspect.isroutine(code) or isinstance(code, partial)


def _problem(error: BaseException) -> str:
    """What user code raised, or that it would end the program, as scripts do."""
    if isinstance(error, SystemExit):
        return f"it ends the program (exit code {error.code})"
    return f"{type(error).__name__}: {error}"


def allow_network(code: Any) -> str:
    """The same of a network, which has no other name than package.module:factory."""
    name = allow(code)
    require_readable(name, "network")
    return name


def name_of(code: Any) -> str:
    """Module and qualified name of an object; of one without a name those of its class."""
    named = code if hasattr(code, "__qualname__") else type(code)
    return f"{named.__module__}:{named.__qualname__}"


def require_allowed(name: str, kind: str, flag: str, where: str) -> None:
    """Raise ConfigError for code that a file names and the user does not; says which flag would."""
    require_all_allowed([(name, kind, flag)], where)


def require_all_allowed(named: Iterable[tuple[str | None, str, str]], where: str) -> None:
    """The same of several names, each with its kind and flag: all that are missing are told."""
    odd, flags = dict[str, str](), list[str]()
    for name, kind, flag in named:
        for one in (name or "").split(","):
            if is_own(one) and one not in _allowed:
                odd[one] = f"the {kind} {one!r}"
                flags.append(f"{flag} {name}")
    if odd:
        what, it = ("modules", "them") if len(odd) > 1 else ("a module", "it")
        raise ConfigError(
            f"{where} names {' and '.join(odd.values())}, {what}; pass "
            f"{' '.join(dict.fromkeys(flags))} to import {it}"
        )


def require_readable(name: str, kind: str) -> None:
    """Raise ConfigError for the name of nothing that could be imported; imports nothing."""
    if _allowed.get(name) is None:
        _split(name, kind)


def _split(name: str, kind: str) -> tuple[str, str]:
    module, _, attribute = name.partition(":")
    parts, file = [*module.split("."), *attribute.split(".")], Path(module)
    if file.suffix == ".py" or not all(part.isidentifier() for part in parts):
        article = "an" if kind[0] in "aeiou" else "a"
        hint = f" ({file.stem}:{attribute} of {file.name})" if file.suffix == ".py" else ""
        raise ConfigError(
            f"expected {article} {kind} as package.module:factory{hint}, got {name!r}"
        )
    return module, attribute


def find(name: str, kind: str) -> Callable[..., Any]:
    """What a name means; ConfigError for what cannot be imported, or cannot be called."""
    found = _allowed.get(name)
    if found is None:
        with _current_folder_importable():
            found = _imported(name, kind)
    if not callable(found):
        raise ConfigError(
            f"{kind} {name!r}: expected a factory, found {type(found).__name__} {found!r:.60}"
        )
    made: Callable[..., Any] = found
    return made


def call(
    name: str, kind: str, given: Iterable[Any] = (), what: str = "no arguments", **options: Any
) -> Any:
    """What the factory of that name returns; its own failures as ConfigError, with the name."""
    factory = find(name, kind)
    try:
        with _current_folder_importable():
            return factory(*given, **options)
    except ConfigError as error:
        raise ConfigError(f"{kind} {name!r}: {error}") from error
    except MergeRLError:
        raise
    except (Exception, SystemExit) as error:
        if not _makes(factory):
            found = f"an object of {type(factory).__name__}, which takes something else"
            raise ConfigError(f"{kind} {name!r}: expected a factory, found {found}") from error
        raise ConfigError(
            f"{kind} {name!r}: calling it with {what} failed: {_problem(error)}"
        ) from error


def place_of(error: BaseException) -> str | None:
    """Where in the user's code an exception was raised, or what was called from there; else None.

    Such as "/home/me/mine.py, line 12, in forward".
    """
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__")).partition(".")[0] in _packages - {"merge_rl"}:
            found = f"{frame.f_code.co_filename}, line {line}, in {frame.f_code.co_name}"
    return found


def _imported(name: str, kind: str) -> Any:
    module, attribute = _split(name, kind)
    _packages.add(module.partition(".")[0])
    try:
        found: Any = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{kind} {name!r}: cannot be imported, from the installed packages or from "
            f"{Path.cwd()}: {_problem(error)}"
        ) from error
    return found


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    """A module beside the user's command is found, but hides no installed one."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)
