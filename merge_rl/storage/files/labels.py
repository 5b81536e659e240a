"""Class labels as files give them: whole numbers in any dress, or the reason why they are none."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, NamedTuple

from merge_rl.late import torch
from merge_rl.untrusted import describe

if TYPE_CHECKING:
    from torch import Tensor

MAX_LABEL: Final = 2**31 - 1
_WHOLE: Final = re.compile(r"[0-9]{1,10}(\.0*)?")


class Labels(NamedTuple):
    """Labels (N,) int64; None where there are none that can be used, with what is wrong if any."""

    values: Tensor | None = None
    problem: str = ""


def parse_labels(values: Iterable[object], name: Callable[[int], str]) -> Labels:
    """Labels from numbers or text (3, 3.0, "3"); `name` says whose label a position is."""
    found = []
    for position, value in enumerate(values):
        label = _whole(value)
        if label is None:
            shown = describe(value)
            return Labels(
                problem=f"the label of {name(position)} is {shown}, expected a whole number from 0"
            )
        found.append(label)
    return Labels(torch.tensor(found, dtype=torch.int64))


def _whole(value: object) -> int | None:
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    # bool is a subclass of int, and no class.
    return value if type(value) is int and 0 <= value <= MAX_LABEL else None
