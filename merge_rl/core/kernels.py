"""Kernel distances between two sets of features: KID and MMD. Lower is closer.

The squared maximum mean discrepancy (Gretton et al., 2012, JMLR 13) with a kernel k is

    MMD² = E k(x, x') + E k(y, y') − 2 E k(x, y).

The unbiased estimate leaves out the pairs of a row with itself and may be negative; the biased one
keeps them and may not. All in float64, in blocks: never a matrix of all pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from merge_rl.core.pairwise import check_block, check_pair, squared_distances
from merge_rl.core.statistics import row_blocks
from merge_rl.errors import ConfigError, TooFewSamplesError

Kernel = Callable[[Tensor, Tensor], Tensor]
"""Symmetric k(x_i, y_j) of all pairs: (N, D), (M, D) of any dtype -> (N, M) float64."""

BLOCK_ROWS = 1024  # kernel values held at a time: 1024 x 1024, 8 MiB


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Kernel values (x_i·y_j/D + 1)³ in float64: (N, D), (M, D) -> (N, M)."""
    product = x.to(torch.float64) @ y.to(torch.float64).T
    return product.div_(x.shape[1]).add_(1).pow_(3)


@dataclass(frozen=True)
class RBFKernel:
    """Kernel values exp(−|x_i − y_j|² / 2b²) of bandwidth b, in float64, within 0..1.

    CMMD (Jayasumana et al., 2024, arXiv:2401.09603) is 1000 times the biased distance with
    bandwidth 10 on CLIP features of unit length.
    """

    bandwidth: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.bandwidth) and self.bandwidth > 0):
            raise ConfigError(f"expected a positive bandwidth, got {self.bandwidth}")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """(N, D), (M, D) -> (N, M)."""
        return squared_distances(x, y).div_(-2 * self.bandwidth**2).exp_()


def kernel_distance(
    x: Tensor,
    y: Tensor,
    kernel: Kernel = cubic_kernel,
    *,
    biased: bool = False,
    block: int = BLOCK_ROWS,
) -> float:
    """Squared MMD over all pairs; by default unbiased with the kernel k(a, b) = (a·b/D + 1)³.

        Σ_{i≠j} k(x_i, x_j) / n(n−1) + Σ_{i≠j} k(y_i, y_j) / m(m−1) − 2 Σ_ij k(x_i, y_j) / nm

    As KID: Bińkowski et al., 2018 (arXiv:1801.01401), there averaged over random subsets; all pairs
    leave no draw and the least variance. x (N, D), y (M, D), N and M >= 2. The unbiased value may
    be negative; `biased` sums over i = j too and divides by n² and m². At most `block` x `block`
    kernel values are held at a time.
    """
    check_block(block)
    check_pair(x, y, at_least=2)
    return _distance(x, y, kernel, biased, block)


class SubsetDistance(NamedTuple):
    """Mean of the distances of random subsets, and their standard deviation (divided by S)."""

    mean: float
    std: float


def subset_kernel_distance(
    x: Tensor,
    y: Tensor,
    kernel: Kernel = cubic_kernel,
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    generator: torch.Generator,
) -> SubsetDistance:
    """KID as it is published: mean and spread of `kernel_distance` over S random subsets.

    Each subset takes `subset_size` rows of x (N, D), then of y (M, D), without replacement, from
    the CPU `generator`. The mean estimates what `kernel_distance` gives without a draw; the spread
    is that of one subset, not of the mean. TooFewSamplesError where a set is smaller than a subset.
    """
    check_pair(x, y, at_least=2)
    if num_subsets < 1 or subset_size < 2:
        got = f"{num_subsets} of {subset_size}"
        raise ConfigError(f"expected at least 1 subset of at least 2 rows, got {got}")
    if subset_size > min(len(x), len(y)):
        got = f"{len(x)} and {len(y)}"
        raise TooFewSamplesError(f"subsets of {subset_size} rows need as many rows, got {got}")
    draws = []
    for _ in range(num_subsets):
        first = torch.randperm(len(x), generator=generator)[:subset_size]
        draws.append((first, torch.randperm(len(y), generator=generator)[:subset_size]))
    values = kernel_distances_of(x, y, draws, kernel)
    return SubsetDistance(float(values.mean()), float(values.std(correction=0)))


def kernel_distances_of(
    x: Tensor, y: Tensor, draws: Sequence[tuple[Tensor, Tensor]], kernel: Kernel = cubic_kernel
) -> Tensor:
    """Unbiased distances (S,) float64 of S subsets, given as row indices of x and of y.

    Other tools' subset estimates come out with the indices that they draw.
    """
    check_pair(x, y, at_least=2)
    if any(min(len(first), len(second)) < 2 for first, second in draws):
        raise TooFewSamplesError("expected subsets of at least 2 rows, got a smaller one")
    values = [_distance(x[first], y[second], kernel, False, BLOCK_ROWS) for first, second in draws]
    return torch.tensor(values, dtype=torch.float64)


def kernel_row_sums(x: Tensor, y: Tensor, kernel: Kernel, block: int = BLOCK_ROWS) -> Tensor:
    """Σ_j k(x_i, y_j) of each row of x: (N, D), (M, D) -> (N,) float64."""
    sums = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for rows, total in zip(row_blocks(x, block), row_blocks(sums, block), strict=True):
        for columns in row_blocks(y, block):
            total += kernel(rows, columns).sum(1)
    return sums


def kernel_mean(x: Tensor, kernel: Kernel, *, biased: bool = False, block: int) -> float:
    """Mean of k(x_i, x_j) over i ≠ j, or over all pairs: blocks above the diagonal count twice."""
    total = 0.0
    for start in range(0, len(x), block):
        rows = x[start : start + block]
        own = kernel(rows, rows)
        total += float(own.sum() if biased else own.sum() - own.trace())
        total += 2 * float(kernel_row_sums(rows, x[start + block :], kernel, block).sum())
    return total / (len(x) * (len(x) if biased else len(x) - 1))


def _distance(x: Tensor, y: Tensor, kernel: Kernel, biased: bool, block: int) -> float:
    across = float(kernel_row_sums(x, y, kernel, block).sum()) / (len(x) * len(y))
    within = sum(kernel_mean(rows, kernel, biased=biased, block=block) for rows in (x, y))
    return within - 2 * across
