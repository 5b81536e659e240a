"""Numbers as people write them: the one parser for manifests, settings and options."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, Final, TypeVar

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
_MOST_WHOLE: Final = 2**64


def whole_number(value: object) -> int | None:
    """A whole number: itself, or text such as "1e6", "8_388_608", "1,024", "50k", "192Mi".

    None for anything else: true and false, fractions, other units, numbers beyond 64 bits.
    """
    found = _exact(value)
    whole = found is not None and abs(found) < _MOST_WHOLE and found == found.to_integral_value()
    return int(found) if found is not None and whole else None


def real_number(value: object) -> float | None:
    """A number: itself, or text such as "5e-2", "50k", "inf"; None for anything else, such as a
    finite number beyond the largest of 64 bits.
    """
    found = _exact(value)
    if found is not None:
        return float(found) if math.isfinite(float(found)) else None
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


_COUNT: Final = re.compile(
    r"num_\w+|in_context_\w+|\w*(resolutions?|channels|dim|size|depth|per_head)|channel_mult\w*"
)
_FLAG: Final = re.compile(r"(use|learn)_\w+")
_REAL: Final = re.compile(r"\w*(balance|ratio|prob|scale|data|dropout|filter|_act)")
_LIST: Final = re.compile(r"channel_mult|attn_resolutions|resample_filter")
_LACKING: Final = re.compile(r"channel_mult_\w+|clip_act")  # null stands for what others say
_NONE_AT_ALL: Final = re.compile(r"label_dim|num_(classes|blocks)|in_context_\w+|\w*depth")
_REPEATED: Final = re.compile(r"num_blocks|\w*depth")  # one module each, which takes time to build
_MOST, _MOST_REPEATED, _MOST_ITEMS = 2**24, 200, 32
_RANGES: Final[Mapping[str, tuple[str, Callable[[float], bool]]]] = {
    "sigma_data": ("> 0", lambda value: value > 0),
    "noise_scale": ("> 0", lambda value: value > 0),
    "mlp_ratio": ("above 0, at most 1000", lambda value: 0 < value <= 1000),
    "clip_act": ("> 0", lambda value: value > 0),
    **dict.fromkeys(
        ("dropout", "class_dropout_prob", "res_balance", "attn_balance", "label_balance",
         "concat_balance"),
        ("from 0 to 1", lambda value: 0 <= value <= 1),
    ),
}  # fmt: skip


def require_sizes(options: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for options of a network that none has, before any is built.

    Numbers are finite and no text; counts and sizes are whole numbers, of which few may be 0, and
    no more than a network can be made of; lists are short, and those of sizes not empty.
    """
    for key, value in options.items():
        if value is None and _LACKING.fullmatch(key):
            continue
        listed, counts = isinstance(value, (list, tuple)), _COUNT.fullmatch(key) is not None
        known = counts or _REAL.fullmatch(key) or _FLAG.fullmatch(key)
        if known and listed != bool(_LIST.fullmatch(key)):
            kind = "one value" if listed else "a list"
            raise ConfigError(f"{where}: expected {key} as {kind}, got {value!r:.60}")
        items = list(value) if listed else [value]
        if len(items) > _MOST_ITEMS or (key == "channel_mult" and not items):
            found = f"{len(items)} items"
            raise ConfigError(f"{where}: expected {key} of 1 to {_MOST_ITEMS} items, got {found}")
        for item in items:
            if expected := _wrong(key, item):
                raise ConfigError(f"{where}: expected {key} {expected}, got {item!r:.60}")


def _wrong(key: str, item: object) -> str | None:
    """What is expected of one value; None where it is as it should be, or nothing is known."""
    number = type(item) in (int, float)
    if _FLAG.fullmatch(key):
        return None if type(item) is bool else "as true or false"
    if _COUNT.fullmatch(key):
        least = 0 if _NONE_AT_ALL.fullmatch(key) else 1
        most = _MOST_REPEATED if _REPEATED.fullmatch(key) else _MOST
        fits = type(item) is int and least <= item <= most
        return None if fits else f"as a whole number from {least} to {most}"
    if (number or _REAL.fullmatch(key)) and not (number and _is_finite(item)):
        return "as a finite number"
    wanted, holds = _RANGES.get(key, ("", lambda _: True))
    return None if holds(item) else wanted


def _is_finite(item: Any) -> bool:
    return bool(abs(item) <= sys.float_info.max)
