"""Names of files: what comes before what, and where a file lies when links lead to it."""

from __future__ import annotations

import os
import re
from pathlib import Path

_NUMBER = re.compile(r"((?<![0-9.])0\.[0-9]+|[0-9]+)")  # 1.10 may well be a version
_ANY_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")


def natural_key(name: str) -> tuple[list[tuple[int, str, str]], str]:
    """Sorts "step_750" before "step_2000": numbers by value, the rest as text.

    Numbers are whole, or between 0 and 1 ("ema-0.050" comes before "ema-0.1"). Names of the same
    numbers keep the order of text.
    """
    parts = _NUMBER.split(name)
    return [_value(part) if i % 2 else (0, part, "") for i, part in enumerate(parts)], name


def without_numbers(name: str) -> str:
    """What names of one series share: "step_750" and "step_2000" are both "step_#"."""
    return _ANY_NUMBER.sub("#", name)


def spellings(path: str | os.PathLike[str]) -> list[Path]:
    """Where a path lies, absolute: as it was given, then with the links of its folder, then its
    own, followed.

    What describes a file may lie beside the link (the Hub's cache) or beside the file.
    """
    given = absolute(path)
    return list(dict.fromkeys([given, given.parent.resolve() / given.name, given.resolve()]))


def absolute(path: str | os.PathLike[str]) -> Path:
    """A path from the root. Links keep their names, of which the ending tells what a file is."""
    return Path(os.path.normpath(Path(path).absolute()))


def _value(number: str) -> tuple[int, str, str]:
    """Of any length: by length first, leading zeros aside, then by digits, is by value."""
    whole, _, fraction = number.partition(".")
    return len(whole.lstrip("0")), whole.lstrip("0"), fraction
