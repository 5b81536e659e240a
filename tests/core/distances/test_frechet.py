"""Fréchet distance: by hand, invariants, official numbers, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_rl.core.distances.frechet import FrechetReference, covariance_factor, frechet_distance
from merge_rl.core.distances.statistics import FeatureStats, feature_stats
from merge_rl.errors import StatisticsError, TooFewSamplesError

FRECHET_PAIRS = ("a_vs_b", "b_vs_a", "a_vs_d", "c_vs_a", "a_vs_c", "c_vs_c", "a_vs_a")


def gaussian(mean: list[float], cov: Tensor, count: int = 9) -> FeatureStats:
    return FeatureStats(count, torch.tensor(mean, dtype=torch.float64), cov.double())


def test_covariance_factor_of_a_singular_matrix() -> None:
    # (1, 2, 3) (1, 2, 3)ᵀ has rank 1: Cholesky has no answer.
    v = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    factor = covariance_factor(torch.outer(v, v))
    torch.testing.assert_close(factor @ factor.T, torch.outer(v, v))


def test_frechet_distance_by_hand() -> None:
    # Means (0, 0) and (3, 0), covariances 4I and 9I: 3² + 2 (2 − 3)² = 11.
    x, y = gaussian([0, 0], 4 * torch.eye(2)), gaussian([3, 0], 9 * torch.eye(2))
    assert frechet_distance(x, y) == pytest.approx(11, rel=1e-14)
    assert FrechetReference.from_stats(y).distance(x) == pytest.approx(11, rel=1e-14)


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    # Σx = diag(1, 4), Σy = [[2, 1], [1, 2]]. Σx Σy = [[2, 1], [4, 8]] has trace 10 and determinant
    # 12, so its root has trace √(10 + 2√12). tr Σx + tr Σy = 9.
    x = gaussian([0, 0], torch.diag(torch.tensor([1.0, 4.0])))
    y = gaussian([0, 2], torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    expected = 4 + 9 - 2 * math.sqrt(10 + 2 * math.sqrt(12))
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-13)
    assert FrechetReference.from_stats(y).distance(x) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("pair", FRECHET_PAIRS)
def test_frechet_distance_matches_exact_values(
    features: dict[str, Tensor], official: dict[str, Any], pair: str
) -> None:
    x, _, y = pair.partition("_vs_")
    expected = official["frechet"][pair]["exact_float64"]["value"]
    value = frechet_distance(feature_stats(features[x]), feature_stats(features[y]))
    # Set c, of 40 rows in 64 dimensions, is no exception: its covariance is singular.
    assert value == pytest.approx(expected, rel=1e-10, abs=1e-10 if x == y else 0)
    assert value >= 0  # where the official value is a rounding error below 0 too


@pytest.mark.parametrize("pair", FRECHET_PAIRS)
def test_prepared_reference_matches_exact_values(
    features: dict[str, Tensor], official: dict[str, Any], pair: str
) -> None:
    x, _, y = pair.partition("_vs_")
    expected = official["frechet"][pair]["exact_float64"]["value"]
    reference = FrechetReference.from_stats(feature_stats(features[y]))
    value = reference.distance(feature_stats(features[x]))
    # Set c has rank 39: roots of rounding errors stand in for 25 zeros, about 1e-8 each.
    rel = 1e-6 if "c" in (x, y) else 1e-8
    assert value == pytest.approx(expected, rel=rel, abs=1e-5 if x == y else 0)


def test_frechet_distance_ignores_rotation_and_follows_scale(generator: torch.Generator) -> None:
    x, y = (torch.randn(60, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    y = 0.5 + y * torch.linspace(0.5, 2, 6)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    value = frechet_distance(feature_stats(x), feature_stats(y))
    turned = frechet_distance(feature_stats(x @ rotation), feature_stats(y @ rotation))
    scaled = frechet_distance(feature_stats(3 * x), feature_stats(3 * y))
    assert turned == pytest.approx(value, rel=1e-10)
    assert scaled == pytest.approx(9 * value, rel=1e-10)
    assert value == pytest.approx(frechet_distance(feature_stats(y), feature_stats(x)), rel=1e-12)


def test_one_sample_is_refused_not_scored() -> None:
    one, two = gaussian([1, 1], torch.zeros(2, 2), count=1), gaussian([1, 1], torch.eye(2))
    for x, y in ((one, two), (two, one)):
        with pytest.raises(TooFewSamplesError, match="got 1"):
            frechet_distance(x, y)
    with pytest.raises(TooFewSamplesError, match="got 1"):
        FrechetReference.from_stats(one)
    with pytest.raises(TooFewSamplesError, match="got 1"):
        FrechetReference.from_stats(two).distance(one)


def test_moments_of_different_dimensions_are_refused() -> None:
    x, y = gaussian([1, 1], torch.eye(2)), gaussian([1, 1, 1], torch.eye(3))
    with pytest.raises(StatisticsError, match="got 2 and 3"):
        frechet_distance(x, y)
    with pytest.raises(StatisticsError, match="got 2 against a reference of 3"):
        FrechetReference.from_stats(y).distance(x)
    with pytest.raises(StatisticsError, match=r"statistics, as feature_stats makes, got Tensor$"):
        frechet_distance(x, torch.ones(3, 2))  # type: ignore[arg-type]


def test_distance_is_never_negative(generator: torch.Generator) -> None:
    # Equal sets, of full and of lower rank: rounding leaves values on both sides of 0.
    for count in (5, 40, 41, 42, 200):
        stats = feature_stats(1e3 * torch.randn(count, 40, generator=generator))
        reference = FrechetReference.from_stats(stats)
        for value in (frechet_distance(stats, stats), reference.distance(stats)):
            assert 0 <= value <= 1e-6 * float(stats.cov.trace())


def test_constant_features_have_a_distance() -> None:
    x, y = (feature_stats(torch.full((3, 2), value)) for value in (1.0, 3.0))
    assert frechet_distance(x, y) == 8
    assert FrechetReference.from_stats(y).distance(x) == 8


# Asymmetric; a negative variance; symmetric with variances of 1, but eigenvalues of 3 and −1.
NO_COVARIANCES = {
    r"symmetric covariance, got entries that differ by 0\.5": [[2.0, 0.5], [1.0, 2.0]],
    "variances of at least 0, got -1": [[2.0, 0.0], [0.0, -1.0]],
    "negative eigenvalues, got -1 beside a largest one of 3": [[1.0, 2.0], [2.0, 1.0]],
    "finite moments, got 1 entries": [[1.0, math.nan], [0.0, 1.0]],
    "finite moments, got 2 entries": [[math.inf, 0.0], [0.0, -math.inf]],
}


@pytest.mark.parametrize("message", NO_COVARIANCES)
def test_covariances_of_no_samples_are_refused(message: str) -> None:
    good, bad = (
        gaussian([0, 0], torch.eye(2)),
        gaussian([0, 1], torch.tensor(NO_COVARIANCES[message])),
    )
    for x, y in ((good, bad), (bad, good), (bad, bad)):
        with pytest.raises(StatisticsError, match=message):
            frechet_distance(x, y)
    with pytest.raises(StatisticsError, match=message):
        FrechetReference.from_stats(bad)


def test_prepared_reference_refuses_what_gives_no_distance() -> None:
    reference = FrechetReference.from_stats(gaussian([0, 0], torch.eye(2)))
    point = FrechetReference.from_stats(gaussian([0, 0], torch.zeros(2, 2)))
    with pytest.raises(StatisticsError, match="negative eigenvalues, got -1"):
        reference.distance(gaussian([0, 0], -torch.eye(2)))
    with pytest.raises(StatisticsError, match="finite moments, got 1 entries"):
        reference.distance(gaussian([math.nan, 0], torch.eye(2)))
    with pytest.raises(StatisticsError, match="a finite distance, got inf"):
        reference.distance(gaussian([1e200, 0], torch.eye(2)))
    with pytest.raises(StatisticsError, match="at least 0, got -2"):
        point.distance(gaussian([0, 0], -torch.eye(2)))


def test_rounding_to_single_precision_is_no_asymmetry(generator: torch.Generator) -> None:
    x = torch.randn(50, 6, generator=generator)
    cov = torch.cov(x.T)
    stats = gaussian([0.0] * 6, cov + 1e-7 * torch.randn(6, 6, generator=generator))
    exact = gaussian([0.0] * 6, cov)
    assert frechet_distance(stats, exact) == pytest.approx(0, abs=1e-6)
