"""Code of the user's own, by the name "package.module:factory".

A name in a file imports nothing by itself, as files come from anywhere: what a run, a manifest, a
model folder or a repository names is looked up where the user has allowed it in this process, by an
option or an argument that names it too, or by handing over the object.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from merge_rl.errors import ConfigError, MergeRLError

_allowed: Final[dict[str, Any]] = {}  # name -> the object, or None: to be imported


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
    factory = inspect.isclass(code) or inspect.isroutine(code) or isinstance(code, partial)
    _allowed[name] = code if factory else lambda *_given, **_options: code
    return name


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
    for one in name.split(","):
        if is_own(one) and one not in _allowed:
            raise ConfigError(
                f"{where} names the {kind} {one!r}, a module; pass {flag} {name} to import it"
            )


def require_readable(name: str, kind: str) -> None:
    """Raise ConfigError for the name of nothing that could be imported; imports nothing."""
    if _allowed.get(name) is None:
        _split(name, kind)


def _split(name: str, kind: str) -> tuple[str, str]:
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")]):
        article = "an" if kind[0] in "aeiou" else "a"
        raise ConfigError(f"expected {article} {kind} as package.module:factory, got {name!r}")
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
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{kind} {name!r}: calling it with {what} failed: {problem}") from error


def _imported(name: str, kind: str) -> Any:
    module, attribute = _split(name, kind)
    try:
        found: Any = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{kind} {name!r}: cannot be imported, from the installed packages or from "
            f"{Path.cwd()}: {problem}"
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
