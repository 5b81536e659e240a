"""How close first-order rewards are to exact ones: their ratio, and a warning."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from merge_rl.late import torch

if TYPE_CHECKING:
    from torch import Tensor

KEY: Final = "first_order"  # of a round's event
MEMORY: Final = 5  # rounds, whose median is looked at
LOW, HIGH = 0.5, 2.0  # ratios between which first-order rewards are taken to do


def first_order_ratio(found: Tensor, exact: Callable[[Tensor], Tensor]) -> float | None:
    """(exact reward of the best candidate - of the worst) / (the same to first order).

    `found` (P,) are rewards to first order, which say who is best and worst; `exact` gives exact
    rewards (2,) of two candidates by their numbers. 1: candidates are told apart as exact rewards
    would; below 0: the wrong way round. None with fewer than two candidates that did not fail, or
    where none is better than another.
    """
    finite = found.isfinite().nonzero()[:, 0]
    if len(finite) < 2:
        return None
    values = found[finite]
    pair = finite[torch.stack([values.argmax(), values.argmin()])]
    near = float(found[pair[0]] - found[pair[1]])
    if near == 0:
        return None
    best, worst = exact(pair).tolist()
    ratio = (best - worst) / near
    return ratio if math.isfinite(ratio) else None


class FirstOrderWatch:
    """Follows the ratios of a run and warns once."""

    def __init__(self) -> None:
        self.ratios: list[float] = []
        self.told = False

    def add(self, ratio: float | None) -> str | None:
        """A warning, when the median of the last `MEMORY` ratios first leaves [0.5, 2]."""
        if ratio is None:
            return None
        self.ratios.append(ratio)
        middle = statistics.median(self.ratios[-MEMORY:])
        if self.told or len(self.ratios) < MEMORY or LOW <= middle <= HIGH:
            return None
        self.told = True
        return (
            f"exact rewards differ by {middle:.2g} times what first-order ones say (median of "
            f"{MEMORY} rounds), expected {LOW:g} to {HIGH:g}: lower reward.subset_size, raise "
            f"reward.pool_size, or name the exact form in reward.name (fid-subset)"
        )


def first_order_warnings(events: Iterable[Mapping[str, Any]]) -> list[str]:
    """What a run that had these events warned of, in their order: one sentence, or none."""
    watch = FirstOrderWatch()
    said = [watch.add(event.get(KEY)) for event in events]
    return [text for text in said if text is not None]


def first_order_line(events: Iterable[Mapping[str, Any]]) -> list[str]:
    """What a run's rounds found, as a line of its report; none where nothing was measured."""
    ratios = [event[KEY] for event in events if event.get(KEY) is not None]
    if not ratios:
        return []
    middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
    return [
        f"exact differences between candidates over first-order ones: median {middle:.2f} "
        f"[{low:.2f}, {high:.2f}] of {len(ratios)} rounds"
    ]
