"""Kernel distance of a pool whose rows are replaced a few at a time.

The sums over pairs are kept row by row, so that n replaced rows cost n (N + M) kernel values
instead of the N (N + M) of all pairs: what a subset-replace reward needs for each candidate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from merge_rl.core.kernels import BLOCK_ROWS, Kernel, cubic_kernel, kernel_mean, kernel_row_sums
from merge_rl.core.pairwise import check_pair
from merge_rl.core.statistics import check_features, row_blocks
from merge_rl.errors import StatisticsError


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
