"""The operators of an evolution over coefficients (G, K): crossover, mutation, rescaling."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_SUM = 0.1  # a row that sums to less is not scaled: the factor would blow it up


def crossover(first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
    """Each coefficient from either parent with the same chance: (G, K), (G, K) -> (G, K)."""
    take = torch.rand(first.shape, generator=generator) < 0.5
    return torch.where(take, first, second)


def mutate(row: Tensor, std: float, count: float, generator: torch.Generator) -> Tensor:
    """Normal(0, std²) added to about `count` of the coefficients, and to one at the least."""
    chance = torch.rand(row.shape, generator=generator, dtype=torch.float64)
    chosen = chance < count / row.numel()
    chosen.view(-1)[chance.argmin()] = True
    noise = torch.randn(row.shape, generator=generator, dtype=torch.float64)
    return row + std * noise * chosen


def rescale(rows: Tensor) -> Tensor:
    """Rows (G, K) divided by their sums; those with a sum below 0.1 are left alone."""
    sums = rows.sum(1, keepdim=True)
    return torch.where(sums > SMALLEST_SUM, rows / sums, rows)
