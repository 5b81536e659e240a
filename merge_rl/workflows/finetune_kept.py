"""Rollouts that an update learns from, and how several processes share them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Kept:
    """Rollouts that an update learns from."""

    noise: Tensor  # (M, C, h, w)
    labels: Tensor  # (M,)
    advantages: Tensor  # (M,)
    rows: Tensor  # (M,) int64, their places among all rollouts of the step
    step: int

    def __len__(self) -> int:
        return len(self.labels)

    def rows_of(self, start: int, stop: int) -> Kept:
        """Those at start..stop-1."""
        part = slice(start, stop)
        return Kept(
            self.noise[part], self.labels[part], self.advantages[part], self.rows[part], self.step
        )

    def parts(self, size: int) -> Iterator[Kept]:
        """Micro-batches."""
        for start in range(0, len(self), size):
            yield self.rows_of(start, start + size)


def write_kept(kept: Kept) -> dict[str, Any]:
    """All but the noise as plain data."""
    return {
        "labels": kept.labels.tolist(), "advantages": kept.advantages.double().tolist(),
        "rows": kept.rows.tolist(), "step": kept.step,
    }  # fmt: skip


def read_kept(document: Mapping[str, Any], noise: Tensor) -> Kept:
    """What `write_kept` wrote; numbers are the same to the last bit."""
    return Kept(
        noise,
        torch.tensor(document["labels"], dtype=torch.int64),
        torch.tensor(document["advantages"], dtype=torch.float64),
        torch.tensor(document["rows"], dtype=torch.int64),
        document["step"],
    )


@dataclass(frozen=True)
class Share:
    """What one of `size` processes has of an update's rollouts: about as many as any other.

    Every process passes through equally many micro-batches, as exchanges of gradients need: one
    that has fewer passes through a rollout that weighs nothing.
    """

    rank: int = 0
    size: int = 1

    def parts(self, kept: Kept, limit: int) -> list[tuple[Kept, int]]:
        """Micro-batches of at most `limit` rollouts, with how many each counts for.

        For `size` times its own, or for none: the mean over processes of sums is then the sum.
        """
        total = len(kept)
        bounds = [total * rank // self.size for rank in range(self.size + 1)]
        own = kept.rows_of(bounds[self.rank], bounds[self.rank + 1])
        parts = [(part, self.size * len(part)) for part in own.parts(limit)]
        slots = max(-(-(stop - start) // limit) for start, stop in pairwise(bounds))
        return parts + [(kept.rows_of(0, 1), 0)] * (slots - len(parts))


@dataclass
class Watched:
    """Means over images and steps of what an update did."""

    sums: dict[str, float] = field(default_factory=dict)
    count: float = 0.0

    @classmethod
    def together(cls, found: Iterable[Mapping[str, Any]]) -> Watched:
        """What several processes have seen, of their fields."""
        whole = cls()
        for part in found:
            whole.count += part["count"]
            for name, total in part["sums"].items():
                whole.sums[name] = whole.sums.get(name, 0.0) + total
        return whole

    def add(self, count: float, **values: float) -> None:
        """Values that are means over `count` images."""
        self.count += count
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + count * value

    def means(self) -> dict[str, float]:
        """By name."""
        return {name: total / max(self.count, 1) for name, total in self.sums.items()}
