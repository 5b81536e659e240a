"""Gradients of rewards by features against differences of distances, and the bias of a pool."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from merge_rl.core.distances.kernels import KernelReference, Witness, cubic_kernel
from merge_rl.core.distances.statistics import feature_stats
from merge_rl.errors import ConfigError
from merge_rl.registry import REWARDS, resolve
from merge_rl.workflows.reference.formats import Reference
from merge_rl.workflows.rewards import (
    Pool,
    RewardGradient,
    RewardSource,
    RewardSum,
    WeightedReward,
    require_gradient,
)
from merge_rl.workflows.rewards.subset_reward import Differentiable

DIM, POOL = 4, 60


def images(count: int, seed: int, shift: float = 0.0, dim: int = DIM) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(9))
    return torch.randn(count, dim, generator=generator) @ mixing / 2 + shift


def term(name: str, weight: float, start: int, stop: int, dim: int = DIM) -> WeightedReward:
    real = images(150, 1, dim=dim)[:, start:stop]
    source = RewardSource(name=name, reference=Reference(stats=feature_stats(real), features=real))
    return WeightedReward(name, weight, resolve("reward", REWARDS, name)(source), start, stop)


def pool_of(features: Tensor) -> Pool:
    return Pool.of(features, torch.arange(len(features)) % 3)


@pytest.mark.parametrize("name", ["fid-subset", "fid-influence"])
def test_a_pool_row_moves_the_distance_as_its_influence_says(name: str) -> None:
    # N d(distance of the pool) / d(row) is the gradient of IF at that row, exactly.
    reward, features = RewardSum([term(name, 2.0, 0, DIM)]), images(POOL, 2, 0.8).double()
    found = RewardGradient(reward, pool_of(features)).cotangents(features) * POOL
    for row, column in ((0, 0), (7, 3), (59, 1)):
        distances = []
        for sign in (1, -1):
            moved = features.clone()
            moved[row, column] += sign * 1e-4
            distances.append(reward.pool_distance(pool_of(moved)))
        expected = POOL * (distances[0] - distances[1]) / 2e-4
        assert float(found[row, column]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["kid-subset", "mmd-subset"])
def test_the_witness_against_its_differences(name: str) -> None:
    reward = RewardSum([term(name, 0.5, 0, DIM)])
    gradient = RewardGradient(reward, pool_of(images(POOL, 2, 0.8)))
    fresh = images(3, 5).double()
    found = gradient.cotangents(fresh)
    for column in range(DIM):
        step = 1e-5 * torch.eye(DIM, dtype=torch.float64)[column]
        change = (gradient.influence(fresh + step) - gradient.influence(fresh - step)) / 2e-5
        torch.testing.assert_close(found[:, column], change / 3, rtol=1e-6, atol=1e-9)
    # An image of real data improves the distance, one far away spoils it.
    real, far = gradient.influence(images(300, 6)).mean(), gradient.influence(images(300, 6, 3))
    assert float(real) < 0 < float(far.mean())


def test_the_witness_by_hand() -> None:
    # k(a, b) = (a b + 1)^3; pool 0, 1, real 1, 2: at x = 1 the means are (1 + 8) / 2 and
    # (8 + 27) / 2. Different pool rows: k = 1; pool and real: (1 + 1 + 8 + 27) / 4.
    reference = KernelReference.of(torch.tensor([[1.0], [2.0]]), cubic_kernel)
    witness = Witness(reference.pool(torch.tensor([[0.0], [1.0]])))
    assert witness.offset == pytest.approx(2 * (1 - 37 / 4))
    found = witness(torch.tensor([[1.0], [math.nan]]))
    assert float(found[0]) == pytest.approx(2 * (9 / 2 - 35 / 2) - 2 * (1 - 37 / 4))
    assert bool(found[1].isnan())


def test_weighted_sums_read_their_own_columns() -> None:
    terms = [term("fid-subset", 2.0, 0, 3, 8), term("kid-subset", 30.0, 3, 8, 8)]
    features, fresh = images(POOL, 3, 0.5, dim=8), images(10, 4, dim=8)
    together = RewardGradient(RewardSum(terms), pool_of(features))
    parts = [
        RewardGradient(
            RewardSum([WeightedReward(t.name, t.weight, t.reward, 0, t.stop - t.start)]),
            pool_of(features[:, t.start : t.stop]),
        )
        for t in terms
    ]
    cut = [fresh[:, t.start : t.stop] for t in terms]
    summed = sum(p.influence(x) for p, x in zip(parts, cut, strict=True))
    torch.testing.assert_close(together.influence(fresh), summed)
    joined = torch.cat([p.cotangents(x) for p, x in zip(parts, cut, strict=True)], 1)
    torch.testing.assert_close(together.cotangents(fresh), joined)


@pytest.mark.parametrize("name", [n for n in REWARDS if n.endswith("-full")])
def test_a_reward_without_a_derivative_is_named(name: str) -> None:
    message = f"needs rewards with a derivative, got '{name}'; .* or the searcher auto"
    with pytest.raises(ConfigError, match=message):
        require_gradient(RewardSum([term(name, 1.0, 0, DIM)]))


def test_the_bias_of_a_distance_is_found_from_halves() -> None:
    # Of the distribution of the real data itself, what is left of the distance is bias.
    reward, levels = RewardSum([term("fid-subset", 1.0, 0, DIM)]), []
    for seed in range(20):
        pool = pool_of(images(POOL, 1000 + seed))
        levels.append(RewardGradient(reward, pool).level(torch.Generator().manual_seed(seed)))
        assert levels[-1].distance == reward.pool_distance(pool)
    found = torch.tensor([[at.distance, at.unbiased, at.noise] for at in levels]).double()
    mean, unbiased, noise = found.mean(0).tolist()
    assert abs(unbiased) < 0.6 * mean
    # The typical size of what chance does to the distance.
    assert 0.4 * float(found[:, 0].std()) < noise < 2.5 * float(found[:, 0].std())


def test_the_trend_is_what_the_newer_half_is_better_by() -> None:
    reward = RewardSum([term("fid-subset", 1.0, 0, DIM)])
    made, quarter = images(POOL, 3), POOL // 4
    pool = pool_of(made)
    at = RewardGradient(reward, pool).level(torch.Generator().manual_seed(0), 3 * quarter)
    older = torch.cat([pool.features[3 * quarter :], pool.features[:quarter]])
    newer = pool.features[quarter : 3 * quarter]
    fid = reward.terms[0].reward
    assert isinstance(fid, Differentiable)
    assert at.trend == pytest.approx(fid.distance_of(older) - fid.distance_of(newer), rel=1e-9)
    assert abs(at.trend) > 0


def test_an_unbiased_distance_has_no_bias() -> None:
    reward, biases = RewardSum([term("kid-subset", 1.0, 0, DIM)]), []
    for seed in range(40):
        pool = pool_of(images(POOL, 2000 + seed))
        biases.append(RewardGradient(reward, pool).level(torch.Generator().manual_seed(seed)).bias)
    found = torch.tensor(biases)
    assert abs(float(found.mean())) < 3 * float(found.std()) / math.sqrt(40)
