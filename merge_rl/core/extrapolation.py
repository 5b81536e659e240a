"""FID at an infinite number of samples, extrapolated from smaller ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_rl.core.distances import FrechetReference
from merge_rl.core.statistics import FeatureStats, check_features, feature_stats
from merge_rl.errors import ConfigError, StatisticsError, TooFewSamplesError

SMALLEST = 5000


@dataclass(frozen=True)
class Extrapolation:
    """A straight line through distances over 1/N, read off at 1/N = 0."""

    value: float  # may be negative: an estimate without bias of a distance near 0
    standard_error: float  # of the intercept, from the scatter of the points about the line
    slope: float  # of the distance over 1/N
    counts: tuple[int, ...]
    distances: tuple[float, ...]


def frechet_infinity(
    features: Tensor,
    reference: FeatureStats,
    *,
    generator: torch.Generator,
    num_points: int = 15,
    smallest: int | None = None,
) -> Extrapolation:
    """FID∞ (Chong & Forsyth, 2020, arXiv:1911.07023): the intercept of FID over 1/N.

    FID of N samples is biased upward by about c/N, with a c of the model's own, so that equal N
    does not make two models comparable. Here FID is taken of random subsets of N rows at
    `num_points` evenly spaced N from `smallest` to all of them, and a line fitted by least squares.

    Args:
        features: (N, D), finite rows of generated images.
        reference: moments of real data; its own finite number of samples stays in the result.
        generator: on the CPU, draws the subsets, each without replacement.
        num_points: at least 3; 15 as in the paper.
        smallest: N of the smallest subset; by default 5000 as in the paper, or half of the rows
            where these are fewer than 10,000. More than D, below which FID is no line in 1/N.

    The points share rows, so the standard error is that of the fit: it lacks the noise that all
    points have in common, which repeats with other seeds show.
    """
    check_features(features, at_least=2)
    count, dim = features.shape
    smallest = min(SMALLEST, count // 2) if smallest is None else smallest
    if num_points < 3:
        raise ConfigError(f"expected at least 3 points for a line and its error, got {num_points}")
    if smallest <= dim or count - smallest < num_points - 1:
        raise TooFewSamplesError(
            f"expected {num_points} different numbers of rows above their {dim} dimensions, "
            f"got {smallest} to {count}"
        )
    prepared = FrechetReference.from_stats(reference)
    counts = torch.linspace(smallest, count, num_points, dtype=torch.float64).round().long()
    distances = []
    for size in counts.tolist():
        rows = torch.randperm(count, generator=generator)[:size]
        distances.append(prepared.distance(feature_stats(features[rows])))
    return fit_inverse_counts(counts.tolist(), distances)


def fit_inverse_counts(counts: list[int], distances: list[float]) -> Extrapolation:
    """Least squares of distances (P,) over 1/counts, P >= 3: d = value + slope / N.

    With z = 1/N, s² = Σ residual² / (P − 2) and S = Σ (z − z̄)², the standard error of the
    intercept is s √(1/P + z̄²/S).
    """
    if len(counts) != len(distances) or len(counts) < 3 or len(set(counts)) < 2:
        raise StatisticsError(
            f"expected at least 3 distances at different counts, got {len(distances)} at {counts}"
        )
    z = 1 / torch.tensor(counts, dtype=torch.float64)
    d = torch.tensor(distances, dtype=torch.float64)
    centred = z - z.mean()
    spread = centred.square().sum()
    slope = (centred * d).sum() / spread
    value = d.mean() - slope * z.mean()
    residuals = d - value - slope * z
    variance = residuals.square().sum() / (len(d) - 2)
    error = variance.sqrt() * (1 / len(d) + z.mean() ** 2 / spread).sqrt()
    if not math.isfinite(float(value)):
        raise StatisticsError(f"expected finite distances, got {distances}")
    return Extrapolation(float(value), float(error), float(slope), tuple(counts), tuple(distances))
