"""Numbers as people write them: the one parser for manifests, settings and options."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Final, TypeVar

from merge_rl.errors import ConfigError

T = TypeVar("T", int, float)

UNITS: Final = {
    "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40,
}  # fmt: skip
EXAMPLES: Final = "50000, 5e4, 50k or 192Mi"

_NUMBER = re.compile(
    r"([+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9][0-9_]*)?(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,3})?)"
    r"\s*([A-Za-z]{0,2})"
)
_MOST_CHARACTERS: Final = 400


def whole_number(value: object) -> int | None:
    """A whole number: itself, or text such as "1e6", "8_388_608", "1,024", "50k", "192Mi".

    None for anything else: true and false, fractions, other units.
    """
    found = _exact(value)
    return int(found) if found is not None and found == found.to_integral_value() else None


def real_number(value: object) -> float | None:
    """A number: itself, or text such as "5e-2", "50k", "inf"; None for anything else."""
    found = _exact(value)
    if found is not None:
        return float(found)
    if isinstance(value, float):  # not finite
        return value
    plain = isinstance(value, str) and value.strip().lstrip("+-").lower() in ("inf", "nan")
    return float(str(value)) if plain else None


def numbers_in(text: str, parse: Callable[[object], T | None]) -> list[T] | None:
    """The numbers of a list such as "0.2,-0.1 5e-2", between commas or spaces; each as `parse`d.

    None where one of them is no number, or where there is none at all.
    """
    found = [parse(part) for part in text.replace(",", " ").split()]
    known = [number for number in found if number is not None]
    return known if known and len(known) == len(found) else None


def byte_count(text: str) -> int | None:
    """Bytes: a number as above, with or without a B: "500MB", "5gb", "2GiB", "1e9"; else None."""
    found = real_number(re.sub("B$", "", text.strip().upper()))
    return int(found) if found is not None and math.isfinite(found) else None


def _exact(value: object) -> Decimal | None:
    if type(value) is int:
        return Decimal(value)
    if isinstance(value, float):
        found = Decimal(repr(float(value)))
        return found if found.is_finite() else None
    if not isinstance(value, str) or len(value) > _MOST_CHARACTERS:
        return None
    match = _NUMBER.fullmatch(value.strip())
    unit = _unit(match[2]) if match else None
    if match is None or unit is None or not re.search("^[+-]?[.]?[0-9]", match[1]):
        return None
    return Decimal(match[1].replace("_", "").replace(",", "")) * unit


def _unit(text: str) -> int | None:
    """Of thousands in either case, but for M, where a small letter is a thousandth's."""
    if text in UNITS:
        return UNITS[text]
    return UNITS.get("k" if text == "K" else text.capitalize() if len(text) == 2 else text)


def nimg_from_kimg(kimg: int) -> int:
    """Images seen, from the kimg = nimg // 1000 of a file name: a multiple of 1024, if one fits."""
    nimg = -(-1000 * kimg // 1024) * 1024
    if kimg < 0 or nimg // 1000 != kimg:
        raise ConfigError(
            f"expected kimg of a multiple of 1024 images, got {kimg} (the next is {nimg // 1000})"
        )
    return nimg
