"""Rollouts that an update learns from, and what one of several processes has of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ProcessShare:
    """What one of `size` processes has of an update's rollouts: about as many as any other.

    Every process passes through equally many micro-batches, as exchanges of gradients need: one
    that has fewer passes through a rollout that weighs nothing.
    """

    rank: int = 0
    size: int = 1

    def parts(self, kept: KeptRollouts, limit: int) -> list[tuple[KeptRollouts, int]]:
        """Micro-batches of at most `limit` rollouts, with how many each counts for.

        For `size` times its own, or for none: the mean over processes of sums is then the sum.
        """
        total = len(kept)
        bounds = [total * rank // self.size for rank in range(self.size + 1)]
        own = kept.rows_of(bounds[self.rank], bounds[self.rank + 1])
        parts = [(part, self.size * len(part)) for part in own.parts(limit)]
        slots = max(-(-(stop - start) // limit) for start, stop in pairwise(bounds))
        return parts + [(kept.rows_of(0, 1), 0)] * (slots - len(parts))


@dataclass(frozen=True, eq=False)
class KeptRollouts:
    """Rollouts that an update learns from."""

    noise: Tensor  # (M, C, h, w)
    labels: Tensor  # (M,)
    advantages: Tensor  # (M,)
    rows: Tensor  # (M,) int64, their places among all rollouts of the step
    step: int
    pull: Tensor | None = None  # (M, D), derivative of an advantage by the image's features

    def __len__(self) -> int:
        return len(self.labels)

    def rows_of(self, start: int, stop: int) -> KeptRollouts:
        """Those at start..stop-1."""
        part = slice(start, stop)
        pull = None if self.pull is None else self.pull[part]
        return KeptRollouts(
            self.noise[part], self.labels[part], self.advantages[part], self.rows[part], self.step,
            pull,
        )  # fmt: skip

    def parts(self, size: int) -> Iterator[KeptRollouts]:
        """Micro-batches."""
        for start in range(0, len(self), size):
            yield self.rows_of(start, start + size)


def write_kept(kept: KeptRollouts) -> dict[str, Any]:
    """All but noise and pull as plain data."""
    return {
        "labels": kept.labels.tolist(), "advantages": kept.advantages.double().tolist(),
        "rows": kept.rows.tolist(), "step": kept.step,
    }  # fmt: skip


def read_kept(
    document: Mapping[str, Any], noise: Tensor, pull: Tensor | None = None
) -> KeptRollouts:
    """What `write_kept` wrote; numbers are the same to the last bit."""
    return KeptRollouts(
        noise,
        torch.tensor(document["labels"], dtype=torch.int64),
        torch.tensor(document["advantages"], dtype=torch.float64),
        torch.tensor(document["rows"], dtype=torch.int64),
        document["step"],
        pull,
    )
