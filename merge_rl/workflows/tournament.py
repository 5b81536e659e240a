"""The best of several merges, by successive halving on fresh seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from merge_rl.core.tournament import Rung, cost
from merge_rl.workflows.score_store import Request, ScoreStore


@dataclass(frozen=True)
class Winner:
    """How a tournament ended."""

    label: str
    score: float | None  # FID to the reference in the last rung; None if nothing was compared
    images_each: int  # of the last rung
    images: int  # of all
    rungs: Sequence[Mapping[str, float]]  # label -> FID, a rung

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with None for what could not be scored."""
        rungs = [
            {label: None if math.isnan(v) else v for label, v in rung.items()}
            for rung in self.rungs
        ]
        return {
            "chosen": self.label, "score": self.score, "images_each": self.images_each,
            "images": self.images, "rungs": rungs,
        }  # fmt: skip


def hold(
    name: str, entries: Mapping[str, Tensor], rungs: tuple[Rung, ...], store: ScoreStore
) -> Winner:
    """Let entries, coefficients (G, K) by label, compete for the lowest FID to the reference.

    All that are left see the same seeds in a rung, and every rung has seeds of its own. An entry
    whose images are not finite drops out first; ties go to the earlier one. Without rungs, the
    first entry wins.
    """
    left, played = list(entries), []
    for index, rung in enumerate(rungs):
        asked = [
            Request(f"{name}/{index}/{label}", entries[label], rung.images, (name, index))
            for label in left
        ]
        found = store.get_all(asked)
        scores = {label: s["reference"] for label, s in zip(left, found, strict=True)}
        played.append(scores)
        order = sorted(left, key=lambda label: (math.isnan(scores[label]), scores[label]))
        left = order[: rungs[index + 1].entries if index + 1 < len(rungs) else 1]
    best = left[0]
    last = played[-1][best] if played else math.nan
    return Winner(
        label=best,
        score=None if math.isnan(last) else last,
        images_each=rungs[-1].images if rungs else 0,
        images=cost(rungs),
        rungs=played,
    )
