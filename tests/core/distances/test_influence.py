"""The influence function: by hand, against finite differences, and what it sums to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from merge_rl.core.distances.frechet_pool import FrechetPool, Influence, ReferenceFactor
from merge_rl.core.distances.statistics import FeatureStats, feature_stats


def draw(count: int, generator: torch.Generator, shift: float = 0.0) -> Tensor:
    mixing = torch.randn(5, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return torch.randn(count, 5, generator=generator, dtype=torch.float64) @ mixing + shift


@pytest.fixture
def features(generator: torch.Generator) -> Tensor:
    return draw(80, generator, shift=0.3)


@pytest.fixture
def pool(features: Tensor, generator: torch.Generator) -> FrechetPool:
    reference = ReferenceFactor.from_stats(feature_stats(draw(300, generator)))
    return reference.pool(feature_stats(features))


def test_by_hand() -> None:
    # One dimension: pool mean 1, variance 4, of N = 5; reference mean 0, variance 9. The distance
    # is μ² + (√v − 3)², so T = 3/2 and IF(x) = 2 (x − 1) − 5/4 · 1/2 (x − 1)² + 1/2 · 4.
    def moments(mean: float, variance: float) -> FeatureStats:
        return FeatureStats(5, torch.tensor([mean]).double(), torch.tensor([[variance]]).double())

    pool = ReferenceFactor.from_stats(moments(0.0, 9.0)).pool(moments(1.0, 4.0))
    influence = Influence.of(pool)
    found = influence(torch.tensor([[1.0], [3.0], [-1.0]]))
    assert found.tolist() == pytest.approx([2.0, 4 - 2.5 + 2, -4 - 2.5 + 2], rel=1e-12)


def test_the_mean_over_the_pool_is_zero(features: Tensor, pool: FrechetPool) -> None:
    values = Influence.of(pool)(features)
    assert float(values.abs().max()) > 1
    assert float(values.mean()) == pytest.approx(0, abs=1e-12)


def test_shares_are_the_derivative_of_the_exact_distance(
    features: Tensor, pool: FrechetPool, generator: torch.Generator
) -> None:
    # Along features + t (mixture): replacing rows is a step of the moments. With the moments moved
    # by a fraction t of that step, the exact distance moves by t times the sum of shares.
    fresh = draw(6, generator, shift=-0.5)
    removed = features[:6]
    stats, count = pool.stats, pool.stats.count
    old, new = removed - stats.mean, fresh - stats.mean
    step_mean = (new - old).sum(0) / count
    step_cov = (new.T @ new - old.T @ old) / (count - 1)

    def distance(t: float) -> float:
        moved = FeatureStats(count, stats.mean + t * step_mean, stats.cov + t * step_cov)
        return pool.reference.pool(moved).distance

    slope = (distance(1e-4) - distance(-1e-4)) / 2e-4
    shares = Influence.of(pool).shares(removed, fresh[None])
    assert shares.shape == (1, 6)
    assert float(shares.sum()) == pytest.approx(slope, rel=1e-6)


def test_small_replacements_change_the_exact_distance_by_their_shares(
    features: Tensor, pool: FrechetPool, generator: torch.Generator
) -> None:
    # Moving two images by h: the error of first order falls with h², so by 100 for a tenth.
    removed, step = features[:2], torch.randn(2, 5, generator=generator, dtype=torch.float64)
    influence, errors = Influence.of(pool), []
    for h in (1e-2, 1e-3):
        fresh = (removed + h * step)[None]
        change = float(pool.distances_with(removed, fresh)) - pool.distance
        errors.append(abs(change - float(influence.shares(removed, fresh).sum())))
    assert errors[1] < errors[0] / 80


def test_images_add_up(features: Tensor, pool: FrechetPool, generator: torch.Generator) -> None:
    influence, fresh = Influence.of(pool), draw(12, generator).reshape(3, 4, 5)
    shares = influence.shares(features[:4], fresh)
    one_by_one = [
        [float(influence.shares(features[i : i + 1], own[i : i + 1][None])) for i in range(4)]
        for own in fresh
    ]
    assert shares.tolist() == [pytest.approx(row, rel=1e-9, abs=1e-12) for row in one_by_one]


def test_singular_moments(generator: torch.Generator) -> None:
    # Features of rank 3 in 5 dimensions on both sides: the same as in those 3 dimensions alone.
    frame = torch.linalg.qr(torch.randn(5, 3, generator=generator, dtype=torch.float64))[0]
    real, made = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (90, 60))
    fresh = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)

    def shares(turn: Tensor) -> Tensor:
        reference = ReferenceFactor.from_stats(feature_stats(real @ turn))
        influence = Influence.of(reference.pool(feature_stats(made @ turn)))
        return influence.shares((made @ turn)[:4], fresh @ turn)

    flat = shares(torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(shares(frame.T.contiguous()), flat, rtol=1e-8, atol=1e-10)


def test_a_pool_without_a_direction_of_the_reference() -> None:
    # The pool varies in the first direction only. A step into the second counts by its square,
    # not by the infinite slope of the root.
    real = feature_stats(torch.tensor([[1.0, 1], [-1, 1], [1, -1], [-1, -1]]).double())
    made = feature_stats(torch.tensor([[1.0, 0], [-1, 0], [2, 0], [-2, 0]]).double())
    influence = Influence.of(ReferenceFactor.from_stats(real).pool(made))
    found = influence(torch.tensor([[0.0, 0], [0, 3]]).double())
    assert float(found[1] - found[0]) == pytest.approx(9 * 4 / 3, rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_images_that_failed(value: float, features: Tensor, pool: FrechetPool) -> None:
    broken = features[:3].clone()
    broken[1, 4] = value
    assert Influence.of(pool)(broken).isnan().tolist() == [False, True, False]
