"""Kernel distances between two sets of features (KID, MMD) and their derivative. Lower is closer.

The squared maximum mean discrepancy (Gretton et al., 2012, JMLR 13) with a kernel k is

    MMD² = E k(x, x') + E k(y, y') − 2 E k(x, y).

The unbiased estimate leaves out the pairs of a row with itself and may be negative; the biased one
keeps them and may not. All in float64, in blocks: never a matrix of all pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_rl.core.distances.statistics import FeatureStats, check_features, row_blocks
from merge_rl.errors import ConfigError, StatisticsError

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
    be negative; `biased` sums over i = j too and divides by n², m². `block`: rows at a time. Raises
    StatisticsError (not finite, unequal D), TooFewSamplesError (1 row), ConfigError (`block` < 1).
    """
    check_block(block)
    check_pair(x, y, at_least=2)
    return _distance(x, y, kernel, biased, block)


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


MAX_ROWS = 2000


def median_bandwidth(features: Tensor) -> float:
    """Median of |y_i − y_j| over the pairs i < j of features (M, D), M >= 2.

    The usual choice where nothing else is known (Gretton et al., 2012, JMLR 13, section 8). Of
    more than 2,000 rows, 2,000 evenly spaced ones are taken. StatisticsError where it is 0, as it
    is if most rows are equal.
    """
    check_features(features, at_least=2)
    count = len(features)
    picked = torch.arange(min(count, MAX_ROWS), device=features.device) * count
    rows = features[picked // min(count, MAX_ROWS)]
    squared = squared_distances(rows, rows)
    above = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
    median = float(squared[above[0], above[1]].median().sqrt())
    if median <= 0:
        raise StatisticsError("expected features of different images, got mostly equal rows")
    return median


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i − y_j|² in float64 from one matrix product: (N, D), (M, D) -> (N, M).

    |x|² + |y|² − 2 x·y leaves rounding errors of a few ε (|x|² + |y|²) where the rows are equal.
    What is below 4 √D ε (|x|² + |y|²) is returned as 0: D = 2048 takes rows for equal that differ
    by 2e-7 of their length, about what float32 resolves. Centre the rows where they lie far out.
    """
    x, y = x.to(torch.float64), y.to(torch.float64)
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    rounding = 4 * math.sqrt(x.shape[1]) * torch.finfo(torch.float64).eps
    # In place: a second matrix of this size is the most memory that any caller needs.
    distances = torch.mm(x, y.T).mul_(-2).add_(norms)
    return distances.masked_fill_(distances < norms.mul_(rounding), 0.0)


def check_pair(x: Tensor, y: Tensor, *, at_least: int) -> None:
    """Refuse two feature sets that are not finite matrices (N, D), (M, D) of enough rows."""
    for features in (x, y):
        check_features(features, at_least=at_least)
    if x.shape[1] != y.shape[1] or x.shape[1] == 0:
        got = f"{x.shape[1]} and {y.shape[1]}"
        raise StatisticsError(f"expected features of one dimension, at least 1, got {got}")


def check_block(block: int) -> None:
    """Refuse blocks without rows."""
    if block < 1:
        raise ConfigError(f"expected blocks of at least 1 row, got {block}")


def quadratic_distance(features: Tensor, reference: FeatureStats) -> float:
    """Squared MMD with the kernel (x·y/D + 1)² about the reference's mean, from its moments alone.

        MMD² = |E x xᵀ − Σ|² / D² + 2 |E x|² / D,   x: features less the reference's mean

    The degree of KID's kernel less one, for references that keep no features. Features (N, D),
    N >= 2, lie on the reference's device. Pairs of a row with itself are left out, so that N does
    not bias it; it may be negative. Lower is closer.
    """
    check_features(features, at_least=2)
    rows = features.to(reference.mean) - reference.mean
    count, dim = rows.shape
    second, mean = rows.T @ rows / count, rows.mean(0)
    norms = rows.square().sum(1) / dim
    pairs = second.square().sum() / dim**2 + 2 * mean.square().sum() / dim
    within = (count * pairs - (norms.square() + 2 * norms).mean()) / (count - 1)
    across, real = (second * reference.cov).sum(), reference.cov.square().sum()
    return float(within + (real - 2 * across) / dim**2)


@dataclass(frozen=True, eq=False)
class KernelReference:
    """Features of real data (M, D), prepared for many unbiased kernel distances against them."""

    features: Tensor
    kernel: Kernel
    within: float  # mean of k over the pairs of different rows

    @classmethod
    def of(cls, features: Tensor, kernel: Kernel = cubic_kernel) -> KernelReference:
        """M >= 2 finite rows; costs M²/2 kernel values."""
        check_features(features, at_least=2)
        return cls(features, kernel, kernel_mean(features, kernel, block=BLOCK_ROWS))

    def pool(self, features: Tensor) -> KernelPool:
        """A pool of N >= 2 rows with its sums over pairs; costs N (N + M) kernel values."""
        check_pair(features, self.features, at_least=2)
        within = _pair_sums(features, self.kernel)
        across = kernel_row_sums(features, self.features, self.kernel)
        return KernelPool(self, features, within, across)


@dataclass(frozen=True, eq=False)
class KernelPool:
    """Features of a pool with the kernel sums that its distance to a reference is made of.

    A value: nothing here alters it. The three tensors are all there is to save. Sums that have
    been updated agree with fresh ones to rounding, about 1e-13 of the kernel's mean.
    """

    reference: KernelReference
    features: Tensor  # (N, D)
    within: Tensor  # (N,) float64: sum of k(x_i, x_j) over j ≠ i
    across: Tensor  # (N,) float64: sum of k(x_i, y_j) over the reference

    @property
    def distance(self) -> float:
        """Unbiased squared MMD of the pool to the reference, as `kernel_distance`."""
        return self._distance(float(self.within.sum()), float(self.across.sum()))

    def distance_with(self, rows: Tensor, features: Tensor) -> float:
        """Distance after replacing rows (n,) by features (n, D): about n (N + M) kernel values."""
        new, kernel = self._checked(rows, features), self.reference.kernel
        old = self.features[rows]
        # Pairs with one end replaced are in the sums of both ends, pairs with both ends twice.
        kept = kernel_row_sums(new, self.features, kernel) - kernel_row_sums(new, old, kernel)
        gone = self.within[rows] - _pair_sums(old, kernel) / 2
        within = self.within.sum() + 2 * (kept + _pair_sums(new, kernel) / 2 - gone).sum()
        change = kernel_row_sums(new, self.reference.features, kernel) - self.across[rows]
        return self._distance(float(within), float(self.across.sum() + change.sum()))

    def replaced(self, rows: Tensor, features: Tensor) -> KernelPool:
        """The pool after replacing rows (n,) by features (n, D); about n (3N + M) kernel values."""
        new, kernel = self._checked(rows, features), self.reference.kernel
        after = self.features.index_copy(0, rows, new)
        if len(rows) == len(after):
            return self.reference.pool(after)  # nothing of the old sums is left to update
        gone = kernel_row_sums(self.features, self.features[rows], kernel)
        within = self.within + (kernel_row_sums(after, new, kernel) - gone)
        fresh = kernel_row_sums(new, after, kernel) - _own_values(new, kernel)
        across = kernel_row_sums(new, self.reference.features, kernel)
        return KernelPool(
            self.reference,
            after,
            within.index_copy(0, rows, fresh),
            self.across.index_copy(0, rows, across),
        )

    def _distance(self, within: float, across: float) -> float:
        count = len(self.features)
        mean = across / (count * len(self.reference.features))
        return within / (count * (count - 1)) + self.reference.within - 2 * mean

    def _checked(self, rows: Tensor, features: Tensor) -> Tensor:
        """The new rows in the pool's dtype: sums must be those of what the pool keeps."""
        check_features(features, at_least=0)
        if tuple(features.shape) != (len(rows), self.features.shape[1]):
            expected = f"({len(rows)}, {self.features.shape[1]})"
            got = tuple(features.shape)
            raise StatisticsError(f"expected new features {expected}, got shape {got}")
        if len(set(rows.tolist())) != len(rows):
            raise StatisticsError("expected each row to be replaced once, got repeated indices")
        return features.to(self.features)


def _own_values(x: Tensor, kernel: Kernel) -> Tensor:
    """k(x_i, x_i) of each row, (N,)."""
    none = torch.zeros(0, dtype=torch.float64, device=x.device)
    own = [kernel(rows, rows).diagonal() for rows in row_blocks(x, BLOCK_ROWS)]
    return torch.cat([none, *own])


def _pair_sums(x: Tensor, kernel: Kernel) -> Tensor:
    """Σ_{j≠i} k(x_i, x_j) of each row, (N,)."""
    return kernel_row_sums(x, x, kernel) - _own_values(x, kernel)


@dataclass(frozen=True, eq=False)
class Witness:
    """IF(x) = 2 (mean_j k(x, x_j) - mean_j k(x, y_j)) - offset, of a pool x_j and real y_j.

    Twice the witness function of the MMD (Gretton et al., 2012, JMLR 13, section 2.3). A replaced
    image changes the distance by IF / N to first order. The offset makes the mean of fresh images
    of the pool's distribution 0 in expectation: pairs of a row with itself are left out of it.
    """

    pool: KernelPool

    @property
    def offset(self) -> float:
        """2 (mean over pairs of different pool rows - mean over pairs of pool and real rows)."""
        count, real = len(self.pool.features), len(self.pool.reference.features)
        within = float(self.pool.within.sum()) / (count * (count - 1))
        return 2 * (within - float(self.pool.across.sum()) / (count * real))

    def __call__(self, features: Tensor) -> Tensor:
        """IF of features (n, D) of any dtype -> (n,) float64, differentiable; NaN as they are."""
        kernel, real = self.pool.reference.kernel, self.pool.reference.features
        within = _row_means(features, self.pool.features, kernel)
        values = 2 * (within - _row_means(features, real, kernel)) - self.offset
        return torch.where(features.isfinite().all(-1), values, torch.nan)


def _row_means(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """Mean over j of k(x_i, y_j): (n, D), (M, D) -> (n,) float64, as a sum that keeps its graph."""
    sums = [kernel(x, rows).sum(1) for rows in row_blocks(y, BLOCK_ROWS)]
    return torch.stack(sums).sum(0) / len(y)
