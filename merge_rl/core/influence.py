"""First-order form of the Fréchet reward: what one image does to the distance of the whole pool.

Let μ, Σ be the pool's moments, μr, Σr the reference's. Moving the pool's mean by dμ and its
covariance by dΣ changes the distance |μ − μr|² + tr Σ + tr Σr − 2 tr((Σ Σr)^½) by

    2 (μ − μr)·dμ + tr((I − T) dΣ),      T = L (Lᵀ Σ L)^(−½) Lᵀ,   L Lᵀ = Σr,

as d tr √M = ½ tr(M^(−½) dM) for M = Lᵀ Σ L. One more image x among N turns μ by (x − μ)/N and Σ by
(x − μ)(x − μ)ᵀ/(N − 1) − Σ/N to first order in 1/N; times N, that is the influence function of the
distance (Hampel, 1974),

    IF(x) = 2 (μ − μr)·(x − μ) + N/(N−1) (x − μ)ᵀ (I − T) (x − μ) − tr((I − T) Σ).

Over the pool it has mean 0. Where n images are replaced, everything else staying, the distance
changes by the sum of IF(new) − IF(old), over N, to first order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from merge_rl.core.frechet_pool import FrechetPool


@dataclass(frozen=True, eq=False)
class Influence:
    """IF(x) = slope·(x − mean) + (x − mean)ᵀ curvature (x − mean) − offset, of N = count images.

    mean, slope (D,) and the symmetric curvature (D, D) float64.
    """

    count: int
    mean: Tensor
    slope: Tensor
    curvature: Tensor
    offset: float

    @classmethod
    def of(cls, pool: FrechetPool) -> Influence:
        """From a pool's eigendecomposition, which all candidates then share.

        Where M = Lᵀ Σ L is singular, its inverse root is the pseudo-inverse: the root has no
        derivative in directions that the reference has and the pool lacks, and an image's step
        into them counts for nothing beyond its square. Directions that the reference lacks need no
        care: L has none of them.
        """
        values, vectors = pool.spectrum
        noise = len(values) * torch.finfo(values.dtype).eps * values[-1]
        quarter = torch.where(values > noise, values, torch.inf).pow(-0.25)
        half = pool.reference.factor @ (vectors * quarter)
        count, cov = pool.stats.count, pool.stats.cov
        curvature = torch.eye(pool.stats.dim).to(cov) - half @ half.T
        return cls(
            count=count,
            mean=pool.stats.mean,
            slope=2 * (pool.stats.mean - pool.reference.stats.mean),
            curvature=curvature * (count / (count - 1)),
            offset=float((curvature * cov).sum()),
        )

    def __call__(self, features: Tensor) -> Tensor:
        """IF of features (..., D) of any dtype -> (...) float64; NaN where they are not finite."""
        rows = features.to(torch.float64) - self.mean
        values = rows @ self.slope + ((rows @ self.curvature) * rows).sum(-1) - self.offset
        return torch.where(features.isfinite().all(-1), values, torch.nan)

    def shares(self, removed: Tensor, added: Tensor) -> Tensor:
        """What each replaced image changes the distance by: (n, D), (P, n, D) -> (P, n) float64.

        Their sum over n is the change of the distance to first order.
        """
        return (self(added) - self(removed)) / self.count
