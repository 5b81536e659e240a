"""Rewards by the Fréchet distance: exact, first-order, of own images."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_rl.core.distances import frechet_pool
from merge_rl.core.distances.frechet import frechet_distance
from merge_rl.core.distances.root_trace import root_trace_changes
from merge_rl.core.distances.statistics import FeatureStats, feature_stats
from merge_rl.workflows.reference.formats import Reference
from merge_rl.workflows.rewards.frechet import (
    FullFrechet,
    InfluenceFrechet,
    Pool,
    PoolCache,
    RewardSource,
    SubsetFrechet,
)

pytestmark = pytest.mark.numerics

DIM = 6


def draw_features(count: int, generator: torch.Generator, shift: float = 0.0) -> Tensor:
    mixing = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(9))
    return torch.randn(count, DIM, generator=generator) @ mixing + 3 + shift


def source(stats: FeatureStats) -> RewardSource:
    return RewardSource(name="a-reward", reference=Reference(stats=stats))


@pytest.fixture
def pool(generator: torch.Generator) -> Pool:
    return Pool.of(draw_features(120, generator, shift=0.4), torch.arange(120) % 4)


@pytest.fixture
def reference(generator: torch.Generator) -> FeatureStats:
    return feature_stats(draw_features(500, generator))


@pytest.fixture
def reward(reference: FeatureStats) -> SubsetFrechet:
    return SubsetFrechet(source(reference))


def test_reward_is_minus_the_distance_of_the_replaced_pool(
    pool: Pool, reference: FeatureStats, reward: SubsetFrechet, generator: torch.Generator
) -> None:
    rows, fresh = torch.tensor([3, 17, 64, 119]), draw_features(8, generator).reshape(2, 4, DIM)
    found = reward.rewards(pool, [(rows, fresh)])
    assert (found.dtype, found.shape) == (torch.float64, (2,))
    for new, value in zip(fresh, found.tolist(), strict=True):
        explicit = pool.features.clone()
        explicit[rows] = new
        expected = -frechet_distance(feature_stats(explicit), reference)
        assert value == pytest.approx(expected, rel=1e-9)
    assert reward.pool_distance(pool) == pytest.approx(frechet_distance(pool.stats, reference))


def test_reward_by_hand() -> None:
    # One dimension. Reference: mean 0, variance 1. The pool (0, 2, 4, 6) with its rows 2 and 3
    # replaced by (0, 2) is (0, 2, 0, 2): mean 1, sample variance 4/3, so
    # FID = (1 - 0)^2 + (sqrt(4/3) - 1)^2.
    reward = SubsetFrechet(source(feature_stats(torch.tensor([[-1.0], [0.0], [1.0]]))))
    pool = Pool.of(torch.tensor([[0.0], [2.0], [4.0], [6.0]]), torch.zeros(4, dtype=torch.int64))
    found = reward.rewards(pool, [(torch.tensor([2, 3]), torch.tensor([[[0.0], [2.0]]]))])
    assert float(found) == pytest.approx(-(1 + (math.sqrt(4 / 3) - 1) ** 2), rel=1e-12)


def test_putting_back_what_was_there_gives_the_pool(pool: Pool, reward: SubsetFrechet) -> None:
    rows = torch.arange(10, 40)
    found = reward.rewards(pool, [(rows, pool.features[rows][None])])
    assert float(found) == pytest.approx(-reward.pool_distance(pool), rel=1e-12)


def test_mean_over_draws(pool: Pool, reward: SubsetFrechet, generator: torch.Generator) -> None:
    draws = [
        (torch.arange(5) + 5 * i, draw_features(10, generator).reshape(2, 5, DIM)) for i in range(3)
    ]
    single = torch.stack([reward.rewards(pool, [draw]) for draw in draws])
    torch.testing.assert_close(reward.rewards(pool, draws), single.mean(0), rtol=1e-12, atol=0)


def test_a_library_that_errs_is_noticed(
    pool: Pool, reference: FeatureStats, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frechet_pool, "MIN_RANK", 1)
    monkeypatch.setattr(frechet_pool, "MAX_SHARE", math.inf)
    draws = [(torch.arange(4), draw_features(8, generator).reshape(2, 4, DIM))]
    good = SubsetFrechet(source(reference))
    expected = good.rewards(pool, draws)
    assert not good.by_eigenvalues

    def wrong(*given: Any) -> tuple[Tensor, Tensor]:
        changes, errors = root_trace_changes(*given)
        return changes * 1.01, errors

    monkeypatch.setattr(frechet_pool, "root_trace_changes", wrong)
    bad = SubsetFrechet(source(reference))
    with pytest.warns(RuntimeWarning, match="distances are off by .* computed from eigenvalues"):
        found = bad.rewards(pool, draws)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)
    torch.testing.assert_close(bad.rewards(pool, draws), expected, rtol=1e-8, atol=0)


def test_a_pool_is_prepared_once(pool: Pool) -> None:
    seen: list[Pool] = []

    def make(given: Pool) -> int:
        seen.append(given)
        return len(seen)

    cache, other = PoolCache(make), Pool(pool.features, pool.labels, pool.stats)
    assert [cache(p) for p in (pool, pool, other, other, pool)] == [1, 1, 2, 2, 3]


# ----------------------------------------------------------------------------------- first order


def test_influence_follows_the_exact_reward(
    pool: Pool, reference: FeatureStats, reward: SubsetFrechet, generator: torch.Generator
) -> None:
    fast = InfluenceFrechet(source(reference))
    shifts = torch.linspace(-0.3, 0.3, 12)[:, None, None]
    draws = [
        (torch.arange(4) + 4 * i, draw_features(48, generator).reshape(12, 4, DIM) + shifts)
        for i in range(2)
    ]
    exact, first_order = (kind.rewards(pool, draws) for kind in (reward, fast))
    assert float(torch.corrcoef(torch.stack([exact, first_order]))[0, 1]) > 0.97
    # Both are distances of the same pool, and mean the same by them.
    change = exact + reward.pool_distance(pool)
    assert float((first_order - exact).abs().max()) < 0.5 * float(change.abs().max())
    assert fast.pool_distance(pool) == reward.pool_distance(pool)


def test_every_image_has_a_reward(
    pool: Pool, reference: FeatureStats, generator: torch.Generator
) -> None:
    fast = InfluenceFrechet(source(reference))
    rows, fresh = torch.arange(7, 12), draw_features(15, generator).reshape(3, 5, DIM)
    images = fast.per_image(pool, rows, fresh)
    assert images.shape == (3, 5)
    together = fast.rewards(pool, [(rows, fresh)])
    torch.testing.assert_close(images.mean(1), together, rtol=1e-12, atol=0)
    # Another image in place of one changes the reward of that one alone.
    other = fresh.clone()
    other[1, 2] = fresh[0, 4]
    changed = fast.per_image(pool, rows, other) != images
    assert changed.nonzero().tolist() == [[1, 2]]


def test_an_image_that_failed_fails_its_candidate(
    pool: Pool, reference: FeatureStats, generator: torch.Generator
) -> None:
    fast = InfluenceFrechet(source(reference))
    rows, fresh = torch.arange(5), draw_features(10, generator).reshape(2, 5, DIM)
    fresh[1, 3, 0] = math.nan
    assert fast.per_image(pool, rows, fresh).isnan().nonzero().tolist() == [[1, 3]]
    assert fast.rewards(pool, [(rows, fresh)]).isnan().tolist() == [False, True]


# ------------------------------------------------------------------------------------ own images


def test_own_images_of_all_draws_count_together(
    pool: Pool, reference: FeatureStats, generator: torch.Generator
) -> None:
    full = FullFrechet(source(reference))
    draws = [(torch.arange(4), draw_features(8, generator).reshape(2, 4, DIM)) for _ in range(3)]
    expected = [
        -frechet_distance(feature_stats(torch.cat([f[p] for _, f in draws])), reference)
        for p in range(2)
    ]
    assert full.rewards(pool, draws).tolist() == pytest.approx(expected, rel=1e-9)
    assert full.pool_distance(pool) == pytest.approx(frechet_distance(pool.stats, reference))
