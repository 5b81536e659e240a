"""The derivative of a squared kernel distance by the distribution of the images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from merge_rl.core.distances.kernels import BLOCK_ROWS, Kernel, KernelPool
from merge_rl.core.distances.statistics import row_blocks


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
