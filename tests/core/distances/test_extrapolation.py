"""FID at an infinite number of samples: the fit by hand, a known distance, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from merge_rl.core.distances.frechet import (
    SMALLEST,
    fit_inverse_counts,
    frechet_distance,
    frechet_infinity,
)
from merge_rl.core.distances.statistics import FeatureStats, feature_stats
from merge_rl.errors import ConfigError, StatisticsError, TooFewSamplesError


def gaussian_reference(dim: int) -> FeatureStats:
    mean = torch.zeros(dim, dtype=torch.float64)
    return FeatureStats(10**6, mean, torch.eye(dim, dtype=torch.float64))


def test_a_line_is_found_exactly() -> None:
    found = fit_inverse_counts([1, 2, 4], [5.0, 4.0, 3.5])  # 3 + 2/N
    assert (found.value, found.slope) == pytest.approx((3, 2), rel=1e-14)
    assert found.standard_error == pytest.approx(0, abs=1e-14)
    assert (found.counts, found.distances) == ((1, 2, 4), (5.0, 4.0, 3.5))


def test_standard_error_by_hand() -> None:
    # 1/N = 1/2, 1/3, 1/6: mean 1/3, S = 1/18. Distances 1, 0, 1: slope 0, intercept 2/3, residuals
    # 1/3, −2/3, 1/3, so s² = 2/3 with one degree of freedom; 2/3 (1/3 + (1/9)/(1/18)) = 14/9.
    found = fit_inverse_counts([2, 3, 6], [1.0, 0.0, 1.0])
    assert found.value == pytest.approx(2 / 3)
    assert found.slope == pytest.approx(0, abs=1e-14)
    assert found.standard_error == pytest.approx(math.sqrt(14) / 3)


def test_bias_of_few_samples_is_taken_out(generator: torch.Generator) -> None:
    # N(0.1, 1.2² I) against N(0, I) in 16 dimensions: 16 (0.1² + 0.2²) = 0.8.
    values, biased = [], []
    for _ in range(8):
        features = 0.1 + 1.2 * torch.randn(1000, 16, generator=generator, dtype=torch.float64)
        found = frechet_infinity(
            features, gaussian_reference(16), generator=generator, smallest=200
        )
        values.append(found.value)
        biased.append(found.distances[-1])
    mean, error = sum(values) / 8, float(torch.tensor(values).std()) / math.sqrt(8)
    assert abs(mean - 0.8) < 3 * error
    assert sum(biased) / 8 - 0.8 > 3 * error


def test_points_go_from_half_to_all_rows(generator: torch.Generator) -> None:
    features = torch.randn(60, 3, generator=generator) * torch.tensor([1.0, 2.0, 0.5])
    found = frechet_infinity(features, gaussian_reference(3), generator=generator)
    assert found.counts == tuple(round(30 + 30 * i / 14) for i in range(15))
    whole = frechet_distance(feature_stats(features), gaussian_reference(3))
    assert found.distances[-1] == pytest.approx(whole, rel=1e-10)
    assert len(set(found.distances)) == 15
    many = torch.randn(2 * SMALLEST + 8, 1, generator=generator)
    found = frechet_infinity(many, gaussian_reference(1), generator=generator, num_points=3)
    assert found.counts == (SMALLEST, 7504, 2 * SMALLEST + 8)


def test_the_generator_decides(generator: torch.Generator) -> None:
    features = torch.randn(80, 2, generator=generator)
    first, again, other = (
        frechet_infinity(
            features, gaussian_reference(2), generator=torch.Generator().manual_seed(seed)
        )
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first.distances[:-1] != other.distances[:-1]


def test_lines_that_cannot_be_drawn_are_refused(generator: torch.Generator) -> None:
    features, reference = torch.randn(60, 31, generator=generator), gaussian_reference(31)
    with pytest.raises(TooFewSamplesError, match="above their 31 dimensions, got 30 to 60"):
        frechet_infinity(features, reference, generator=generator)
    with pytest.raises(TooFewSamplesError, match="above their 31 dimensions, got 31 to 60"):
        frechet_infinity(features, reference, generator=generator, smallest=31)
    with pytest.raises(TooFewSamplesError, match="15 different numbers .* got 50 to 60"):
        frechet_infinity(features, reference, generator=generator, smallest=50)
    with pytest.raises(ConfigError, match="at least 3 points .* got 2"):
        frechet_infinity(features, reference, generator=generator, num_points=2)
    with pytest.raises(StatisticsError, match="60 of 60 rows with NaN"):
        frechet_infinity(features * torch.nan, reference, generator=generator)
    with pytest.raises(StatisticsError, match="got 31 against a reference of 2"):
        frechet_infinity(features, gaussian_reference(2), generator=generator, smallest=40)
    with pytest.raises(StatisticsError, match="at least 3 distances"):
        fit_inverse_counts([5, 5, 5], [1.0, 2.0, 3.0])
    with pytest.raises(StatisticsError, match="finite distances"):
        fit_inverse_counts([5, 6, 7], [1.0, math.nan, 3.0])
