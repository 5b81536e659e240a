"""Fréchet and kernel distances: by hand, invariants, official numbers, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from merge_rl.core.distances import (
    FrechetReference,
    covariance_factor,
    cubic_kernel,
    frechet_distance,
    kernel_distance,
)
from merge_rl.core.statistics import FeatureStats, feature_stats
from merge_rl.errors import ConfigError, StatisticsError, TooFewSamplesError

FRECHET_PAIRS = ("a_vs_b", "b_vs_a", "a_vs_d", "c_vs_a", "a_vs_c", "c_vs_c", "a_vs_a")
KERNEL_PAIRS = ("a_vs_b", "a_vs_d", "c_vs_a")


@pytest.fixture(scope="module")
def official(golden: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((golden / "metrics/expected.json").read_text())
    return values


@pytest.fixture(scope="module")
def features(golden: Path) -> dict[str, Tensor]:
    files = {name: golden / f"metrics/features_{name}.npz" for name in "abcd"}
    return {name: torch.from_numpy(np.load(file)["features"]) for name, file in files.items()}


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


def test_kernel_distance_by_hand() -> None:
    # D = 2, k = (x·y/2 + 1)³. x: (2, 0), (0, 2): k = 1. y: (2, 2), (4, 0): k = (8/2 + 1)³ = 125.
    # Across: 4/2, 8/2, 4/2, 0 plus 1, cubed: 27, 125, 27, 1, mean 45. 1 + 125 − 2·45 = 36.
    x, y = torch.tensor([[2, 0], [0, 2]]), torch.tensor([[2, 2], [4, 0]])
    assert cubic_kernel(x, y).tolist() == [[27, 125], [27, 1]]
    assert kernel_distance(x, y) == pytest.approx(36, rel=1e-14)


@pytest.mark.parametrize("pair", KERNEL_PAIRS)
@pytest.mark.parametrize("block", [1024, 77])
def test_kernel_distance_matches_exact_values(
    features: dict[str, Tensor], official: dict[str, Any], pair: str, block: int
) -> None:
    x, _, y = pair.partition("_vs_")
    expected = official["kid"][pair]["exact_unbiased_float64"]
    value = kernel_distance(features[x], features[y], block=block)
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-13)


def test_kernel_distance_is_symmetric_and_leaves_inputs_alone(generator: torch.Generator) -> None:
    x, y = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (7, 11))
    before = x.clone()
    assert kernel_distance(x, y, 3) == pytest.approx(kernel_distance(y, x, 4), rel=1e-10)
    assert torch.equal(x, before)


def test_features_without_a_kernel_distance_are_refused() -> None:
    x = torch.ones(3, 4)
    with pytest.raises(TooFewSamplesError, match="got 1"):
        kernel_distance(x, x[:1])
    with pytest.raises(StatisticsError, match="got 4 and 2"):
        kernel_distance(x, x[:, :2])
    with pytest.raises(StatisticsError, match="got 3 of 3 rows"):
        kernel_distance(x * torch.nan, x)
    with pytest.raises(ConfigError, match="got 0"):
        kernel_distance(x, x, block=0)
