"""Mean and covariance of feature sets: collected once, merged, updated when rows are replaced.

Moments are taken about the mean in float64: raw second moments would lose every digit of a
covariance that is small beside the squared mean. Nothing here alters its inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_rl.errors import StatisticsError, TooFewSamplesError

BLOCK_ROWS = 1024  # rows converted to float64 at a time: 16 MiB at D = 2048
MOMENT_TOLERANCE = 1e-5  # asymmetry and negative variance that rounding to float32 explains


@dataclass(frozen=True, eq=False)
class FeatureStats:
    """Moments of `count` feature rows: mean (D,) and sample covariance (D, D), n−1, float64.

    Raises StatisticsError for other shapes and dtypes, TooFewSamplesError for a count below 1.
    """

    count: int
    mean: Tensor
    cov: Tensor

    def __post_init__(self) -> None:
        dim = self.mean.numel()
        if self.mean.ndim != 1 or tuple(self.cov.shape) != (dim, dim):
            got = f"{tuple(self.mean.shape)} and {tuple(self.cov.shape)}"
            raise StatisticsError(f"expected a mean (D,) and a covariance (D, D), got shapes {got}")
        if self.mean.dtype != torch.float64 or self.cov.dtype != torch.float64:
            got = f"{self.mean.dtype} and {self.cov.dtype}"
            raise StatisticsError(f"expected moments in float64, got {got}")
        if self.count < 1:
            raise TooFewSamplesError(f"expected moments of at least 1 sample, got {self.count}")

    @property
    def dim(self) -> int:
        """Number of features D."""
        return self.mean.numel()

    @property
    def scatter(self) -> Tensor:
        """Sum of (x − mean)(x − mean)ᵀ over the rows: cov · (count − 1), (D, D)."""
        return self.cov * (self.count - 1)


def feature_stats(features: Tensor) -> FeatureStats:
    """Moments of features (N, D) of any real dtype, N >= 2, in two passes over blocks of rows.

    The second pass holds one block in float64, never a float64 copy of all rows. Raises
    StatisticsError for what is no finite matrix, TooFewSamplesError for fewer than 2 rows.
    """
    check_features(features, at_least=2)
    count, dim = features.shape
    mean = feature_mean(features)
    scatter = torch.zeros(dim, dim, dtype=torch.float64, device=features.device)
    for block in row_blocks(features, BLOCK_ROWS):
        centred = block.to(torch.float64) - mean
        scatter.addmm_(centred.T, centred)
    return FeatureStats(count, mean, scatter / (count - 1))


def feature_mean(features: Tensor) -> Tensor:
    """Mean (D,) in float64 of features (N, D) of any dtype, block by block."""
    # A sum of all rows in another dtype would first copy them to it.
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for block in row_blocks(features, BLOCK_ROWS):
        total += block.sum(0, dtype=torch.float64)
    return total / len(features)


def merge_stats(a: FeatureStats, b: FeatureStats) -> FeatureStats:
    """Moments of the union of two disjoint sets (Chan, Golub & LeVeque, 1983, eq. 2.1).

    mean    = mean_a + δ n_b/n                               with δ = mean_b − mean_a
    scatter = scatter_a + scatter_b + δδᵀ n_a n_b/n
    """
    check_same_dim(a, b)
    count, delta = a.count + b.count, b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    between = torch.outer(delta, delta) * (a.count * b.count / count)
    return FeatureStats(count, mean, (a.scatter + b.scatter + between) / (count - 1))


def extend_stats(stats: FeatureStats | None, features: Tensor) -> FeatureStats | None:
    """Moments after further rows (N, D), N >= 0, for sets too large to hold; None before any."""
    if len(features) == 0:
        return stats
    if len(features) == 1:
        check_features(features, at_least=1)
        mean = features[0].to(torch.float64)
        more = FeatureStats(1, mean, mean.new_zeros(len(mean), len(mean)))
    else:
        more = feature_stats(features)
    return more if stats is None else merge_stats(stats, more)


def replace_rows(stats: FeatureStats, old: Tensor, new: Tensor) -> FeatureStats:
    """Moments of the set after its rows `old` (n, D) have become `new` (n, D), in O(n D²).

    With rows taken about the present mean (o, r) and the shift of the mean δ = (Σr − Σo)/N,

        scatter' = scatter + Σ r rᵀ − Σ o oᵀ − N δδᵀ

    is one signed product of a factor with 2n+1 rows. That `old` are rows of the set is up to the
    caller: it cannot be seen from the moments.
    """
    for rows in (old, new):
        check_features(rows, at_least=0)
    if old.shape != new.shape or old.shape[1] != stats.dim or len(old) > stats.count:
        got = f"{tuple(old.shape)} and {tuple(new.shape)}"
        raise StatisticsError(
            f"expected old and new rows (n, {stats.dim}), n <= {stats.count}, got shapes {got}"
        )
    if stats.count < 2:
        raise TooFewSamplesError(f"expected moments of at least 2 samples, got {stats.count}")
    removed, added = old.to(torch.float64) - stats.mean, new.to(torch.float64) - stats.mean
    # Row by row first: two large sums that almost cancel would cost digits of the small shift.
    shift = (added - removed).sum(0) / stats.count
    factor = torch.cat([added, removed, stats.count**0.5 * shift[None]])
    signs = factor.new_full((len(factor), 1), -1.0)
    signs[: len(new)] = 1.0
    cov = torch.addmm(stats.cov, (signs * factor).T, factor, alpha=1 / (stats.count - 1))
    return FeatureStats(stats.count, stats.mean + shift, cov)


def row_blocks(features: Tensor, size: int) -> Iterator[Tensor]:
    """Views of `size` consecutive rows at a time, the last one shorter."""
    for start in range(0, len(features), size):
        yield features[start : start + size]


def check_features(features: Tensor, *, at_least: int) -> None:
    """Refuse what is not a finite matrix (N, D) of at least that many rows."""
    if not isinstance(features, Tensor):
        raise StatisticsError(f"expected features as a tensor, got {type(features).__name__}")
    if features.ndim != 2:
        raise StatisticsError(f"expected features (N, D), got shape {tuple(features.shape)}")
    if features.is_complex():
        raise StatisticsError(f"expected features as real numbers, got {features.dtype}")
    if len(features) < at_least:
        raise TooFewSamplesError(f"expected at least {at_least} feature rows, got {len(features)}")
    bad = 0
    for block in row_blocks(features, BLOCK_ROWS):
        bad += int((~block.isfinite()).any(1).sum())
    if bad:
        raise StatisticsError(
            f"expected finite features, got {bad} of {len(features)} rows with NaN or infinity"
        )


def check_moments(stats: FeatureStats) -> None:
    """Refuse moments that no 2 or more samples have: the check where statistics come in.

    Finite, with a symmetric covariance that has no negative variance, to MOMENT_TOLERANCE of its
    largest entry. `FeatureStats` itself checks shapes and dtypes only: updates make many of them,
    from moments that have passed here. Costs a few passes over the covariance.
    """
    check_count(stats)
    check_finite_moments(stats)
    if stats.dim == 0:
        raise StatisticsError("expected moments of at least 1 dimension, got none")
    scale = float(stats.cov.abs().max())
    gap = float((stats.cov - stats.cov.T).abs().max())
    if gap > MOMENT_TOLERANCE * scale:
        raise StatisticsError(
            f"expected a symmetric covariance, got entries that differ by {gap:.3g} from their "
            f"mirror image, where the largest is {scale:.3g}"
        )
    lowest = float(stats.cov.diagonal().min())
    if lowest < -MOMENT_TOLERANCE * scale:
        raise StatisticsError(f"expected variances of at least 0, got {lowest:.3g}")


def check_count(stats: FeatureStats) -> None:
    """Refuse moments of a single sample, which have no covariance."""
    if stats.count < 2:
        raise TooFewSamplesError(
            f"expected moments of at least 2 samples for a distance, got {stats.count}"
        )


def check_finite_moments(stats: FeatureStats) -> None:
    """Refuse moments with NaN or infinity."""
    # One sum tells, at a thirtieth of the cost of looking at each entry.
    if not bool((stats.mean.sum() + stats.cov.sum()).isfinite()):
        bad = sum(int((~moment.isfinite()).sum()) for moment in (stats.mean, stats.cov))
        if bad:
            raise StatisticsError(f"expected finite moments, got {bad} entries of NaN or infinity")


def check_same_dim(a: FeatureStats, b: FeatureStats) -> None:
    """Raise StatisticsError unless both are statistics of the same number of features."""
    given: tuple[object, ...] = (a, b)
    for stats in given:
        if not isinstance(stats, FeatureStats):
            found = type(stats).__name__
            raise StatisticsError(f"expected statistics, as feature_stats makes, got {found}")
    if a.dim != b.dim:
        raise StatisticsError(f"expected moments of one dimension, got {a.dim} and {b.dim}")
