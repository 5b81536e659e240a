"""Fréchet distances of a pool whose rows are replaced, for many candidates at once.

Nothing is recomputed from the pool's N rows. With L Lᵀ the reference's covariance, the overlap
tr((Σ Σr)^½) is tr √M for M = Lᵀ Σ L, and what n replaced rows do to M has rank 2n. Two ways to
the candidates' overlaps, both in float64 and exact to 1e-6 of the distance or better:

- the eigenvalues of every candidate's M';
- `root_trace_changes`, from one eigendecomposition of M: at 2,048 dimensions 20 times less work
  for a candidate, with a bound on its error. Where the bound is too high, the first way is taken.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_rl.core.distances.frechet import covariance_factor
from merge_rl.core.distances.root_trace import root_rule, root_trace_changes
from merge_rl.core.distances.statistics import (
    FeatureStats,
    check_count,
    check_features,
    check_finite_moments,
    check_moments,
    check_same_dim,
    feature_stats,
    row_blocks,
)
from merge_rl.errors import StatisticsError

TOLERANCE = 1e-6  # of a distance: above it the error bound sends a candidate to eigenvalues
MIN_RANK = 512  # below it, and for changes above a quarter of the rank, eigenvalues are as quick
MAX_SHARE = 0.25
CHUNK_BYTES = 2**28  # held at a time for candidates


@dataclass(frozen=True, eq=False)
class ReferenceFactor:
    """A reference prepared for many distances: mean (D,), trace, and L (D, r) with L Lᵀ = Σr.

    r is the covariance's rank: directions in which real data do not vary add nothing to overlaps.
    """

    stats: FeatureStats
    factor: Tensor

    @classmethod
    def from_stats(cls, stats: FeatureStats) -> ReferenceFactor:
        """The reference of these moments; StatisticsError where they are too few or not finite."""
        check_moments(stats)
        factor = covariance_factor(stats.cov)
        used = factor.abs().amax(0) > 0
        used[-1] = True  # of constant features too something is kept
        return cls(stats, factor[:, used])

    @property
    def rank(self) -> int:
        """Columns of the factor: the rank of the covariance, at least 1."""
        return self.factor.shape[1]

    def distance_of(self, features: Tensor) -> float:
        """Squared Fréchet distance of features (n, D), n >= 2, on their own; finite ones only.

        Of fewer rows than the reference's rank the overlap is the nuclear norm of the rows
        times L: thousands of eigenvalues that are 0 are never computed.
        """
        if len(features) > self.rank:
            return self.pool(feature_stats(features)).distance
        check_features(features, at_least=2)
        rows = features.to(torch.float64)
        centred = (rows - rows.mean(0)) / (len(rows) - 1) ** 0.5
        overlap = torch.linalg.svdvals(centred @ self.factor).sum()
        gap = (rows.mean(0) - self.stats.mean).square().sum()
        traces = centred.square().sum() + self.stats.cov.trace()
        return max(float(gap + traces - 2 * overlap), 0.0)

    def pool(self, stats: FeatureStats) -> FrechetPool:
        """The moments of a pool, prepared; NaN, infinity and other dimensions are refused."""
        check_count(stats)
        check_same_dim(stats, self.stats)
        check_finite_moments(stats)
        return FrechetPool(self, stats)


@dataclass(frozen=True, eq=False)
class FrechetPool:
    """Moments of a pool, prepared for the distances of what it becomes when rows are replaced.

    A value: nothing alters it. What is costly is computed on first use, and kept.
    """

    reference: ReferenceFactor
    stats: FeatureStats

    @functools.cached_property
    def product(self) -> Tensor:
        """M = Lᵀ Σ L, (r, r)."""
        factor = self.reference.factor
        return factor.T @ self.stats.cov @ factor

    @functools.cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of M, ascending and not below 0, and the eigenvectors as columns."""
        values, vectors = torch.linalg.eigh(self.product)
        return _sound(values, self.stats.count), vectors

    @property
    def updatable(self) -> bool:
        """Whether changes of low rank are cheaper than eigenvalues, and well conditioned."""
        return MIN_RANK <= self.reference.rank < self.stats.count - 1

    @functools.cached_property
    def overlap(self) -> float:
        """tr √M."""
        if self.updatable:
            return float(self.spectrum[0].sqrt().sum())
        values = torch.linalg.eigvalsh(self.product)
        return float(_sound(values, self.stats.count).sqrt().sum())

    @functools.cached_property
    def distance(self) -> float:
        """Squared Fréchet distance of the pool itself, at least 0."""
        gap = (self.stats.mean - self.reference.stats.mean).square().sum()
        traces = self.stats.cov.trace() + self.reference.stats.cov.trace()
        return max(float(gap + traces) - 2 * self.overlap, 0.0)

    def distances_with(
        self, removed: Tensor, added: Tensor, *, by_eigenvalues: bool = False
    ) -> Tensor:
        """Distances (P,) after the rows removed (n, D) have become added (P, n, D); float64.

        NaN for candidates with a feature that is not finite. That `removed` are rows of the pool
        is up to the caller. All tensors lie on the device of the moments. `by_eigenvalues` takes
        the slower way for all: what the other one is checked against.
        """
        self._check(removed, added)
        distances = torch.full((len(added),), torch.nan, dtype=torch.float64, device=added.device)
        sound = added.isfinite().flatten(1).all(1).nonzero()[:, 0]
        old = removed.to(torch.float64) - self.stats.mean
        for part in row_blocks(sound, self._chunk(len(removed))):
            new = added[part].to(torch.float64) - self.stats.mean
            distances[part] = self._chunk_distances(old, new, by_eigenvalues)
        return distances

    def _chunk_distances(self, old: Tensor, new: Tensor, by_eigenvalues: bool) -> Tensor:
        """Distances of candidates, from rows about the mean of the pool."""
        count = self.stats.count
        shift = (new - old).sum(1) / count
        grown = new.square().sum((1, 2)) - old.square().sum() - count * shift.square().sum(1)
        gap = (self.stats.mean + shift - self.reference.stats.mean).square().sum(1)
        traces = self.stats.cov.trace() + self.reference.stats.cov.trace() + grown / (count - 1)
        small = 0 < 2 * len(old) <= MAX_SHARE * self.reference.rank
        if by_eigenvalues or not (small and self.updatable):
            overlaps = self._overlaps_by_eigenvalues(old, new)
        else:
            overlaps, errors = self._overlaps_by_changes(old, new)
            doubtful = 2 * errors > TOLERANCE * (gap + traces - 2 * overlaps)
            if bool(doubtful.any()):
                overlaps[doubtful] = self._overlaps_by_eigenvalues(old, new[doubtful])
        return (gap + traces - 2 * overlaps).clamp(min=0)

    def _overlaps_by_changes(self, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """Overlaps (P,) from the pool's own and its changes, and bounds on their errors."""
        values, vectors = self.spectrum
        removed, added = (self._scaled(rows) @ vectors for rows in (old, new))
        changes, errors = root_trace_changes(values, removed, added, self.stats.count, root_rule())
        return self.overlap + changes, errors

    def _overlaps_by_eigenvalues(self, old: Tensor, new: Tensor) -> Tensor:
        """Overlaps (P,) from the eigenvalues of every M'."""
        count, gone = self.stats.count, self._scaled(old)
        kept = self.product - gone.T @ gone
        overlaps = []
        for rows in self._scaled(new):
            shift = (rows - gone).sum(0)
            product = kept + rows.T @ rows - torch.outer(shift, shift) / count
            overlaps.append(_sound(torch.linalg.eigvalsh(product), count).sqrt().sum())
        return torch.stack(overlaps)

    def _scaled(self, rows: Tensor) -> Tensor:
        """Rows (..., D) about the mean as factors of M, (..., r)."""
        scale: float = (self.stats.count - 1) ** 0.5
        return rows @ self.reference.factor / scale

    def _chunk(self, size: int) -> int:
        """Candidates of `size` rows to work on at a time."""
        widest = max(self.stats.dim, 2 * size)
        return max(1, CHUNK_BYTES // (4 * 8 * max(size, 1) * widest))

    def _check(self, removed: Tensor, added: Tensor) -> None:
        good = removed.ndim == 2 and added.ndim == 3 and added.shape[1:] == removed.shape
        if not good or removed.shape[1] != self.stats.dim or len(removed) > self.stats.count:
            found = f"{tuple(removed.shape)} and {tuple(added.shape)}"
            raise StatisticsError(
                f"expected removed rows (n, {self.stats.dim}), n <= {self.stats.count}, and added "
                f"rows (P, n, {self.stats.dim}), got shapes {found}"
            )


def _sound(values: Tensor, count: int) -> Tensor:
    """Eigenvalues, ascending, without what rounding makes of zeros.

    A covariance of N rows has rank N − 1 at most: each further eigenvalue is rounding, and its root
    would count.
    """
    values = values.clamp(min=0)
    values[: max(len(values) - (count - 1), 0)] = 0
    return values


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
