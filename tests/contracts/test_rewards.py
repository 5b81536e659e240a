"""What every registered reward keeps to."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from merge_rl.core.distances.statistics import feature_stats
from merge_rl.errors import StatisticsError
from merge_rl.interfaces import Reward
from merge_rl.registry import REWARDS, resolve
from merge_rl.workflows.reference.formats import Reference
from merge_rl.workflows.rewards.frechet import Pool, RewardSource
from merge_rl.workflows.rewards.sum import RewardSum, WeightedReward

pytestmark = pytest.mark.numerics

DIM, POOL = 5, 90
NEEDS_FEATURES = [name for name in REWARDS if name.startswith(("kid", "mmd"))]
OWN_IMAGES = [name for name in REWARDS if name.endswith("full")]


def images(count: int, generator: torch.Generator, shift: float = 0.0) -> Tensor:
    mixing = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(9))
    return torch.randn(count, DIM, generator=generator) @ mixing / 2 + shift


Make = Callable[[str], Reward[Pool]]


@pytest.fixture
def make() -> Make:
    real = images(200, torch.Generator().manual_seed(1))
    reference = Reference(stats=feature_stats(real), features=real)

    def built(name: str) -> Reward[Pool]:
        reward: Reward[Pool] = resolve("reward", REWARDS, name)(
            RewardSource(name=name, reference=reference)
        )
        return reward

    return built


@pytest.fixture
def pool(generator: torch.Generator) -> Pool:
    return Pool.of(images(POOL, generator, 0.8), torch.arange(POOL) % 3)


@pytest.fixture(params=REWARDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_better_images_are_rewarded(
    name: str, make: Make, pool: Pool, generator: torch.Generator
) -> None:
    reward, rows, base = make(name), torch.arange(0, 90, 3), images(30, generator)
    fresh = torch.stack([base + shift for shift in (0.0, 0.8, 1.6, 3.2)])
    found = reward.rewards(pool, [(rows, fresh)])
    assert (found.dtype, found.shape, found.device.type) == (torch.float64, (4,), "cpu")
    assert found.tolist() == sorted(found.tolist(), reverse=True)
    assert len(set(found.tolist())) == 4
    if name not in OWN_IMAGES:
        assert found[0] > -reward.pool_distance(pool) > found[3]


def test_candidates_are_scored_as_if_alone(
    name: str, make: Make, pool: Pool, generator: torch.Generator
) -> None:
    reward = make(name)
    draws = [(torch.arange(8) + 8 * i, images(40, generator).reshape(5, 8, DIM)) for i in range(2)]
    together = reward.rewards(pool, draws)
    alone = [reward.rewards(pool, [(rows, f[p : p + 1]) for rows, f in draws]) for p in range(5)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-9, atol=1e-12)


def test_the_order_of_images_plays_no_part(
    name: str, make: Make, pool: Pool, generator: torch.Generator
) -> None:
    reward, rows = make(name), torch.tensor([5, 40, 80, 2])
    fresh, turn = images(8, generator).reshape(2, 4, DIM), torch.tensor([2, 0, 3, 1])
    found = reward.rewards(pool, [(rows[turn], fresh[:, turn])])
    torch.testing.assert_close(found, reward.rewards(pool, [(rows, fresh)]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_failed_candidates_are_nan(
    value: float, name: str, make: Make, pool: Pool, generator: torch.Generator
) -> None:
    reward = make(name)
    draws = [(torch.arange(6) + 6 * i, images(18, generator).reshape(3, 6, DIM)) for i in range(2)]
    draws[1][1][1, 4, 2] = value
    assert reward.rewards(pool, draws).isnan().tolist() == [False, True, False]


def test_inputs_are_left_as_they_are(
    name: str, make: Make, pool: Pool, generator: torch.Generator
) -> None:
    rows, fresh = torch.arange(6), images(12, generator).reshape(2, 6, DIM)
    inputs = [rows, fresh, pool.features, pool.labels, pool.stats.mean, pool.stats.cov]
    before = [x.clone() for x in inputs]
    reward = make(name)
    reward.rewards(pool, [(rows, fresh)])
    reward.pool_distance(pool)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


def test_a_restored_reward_gives_the_same_bits(
    name: str, make: Make, pool: Pool, generator: torch.Generator
) -> None:
    # A pool that has been refreshed a few times: updated sums differ from fresh ones in last bits.
    reward = make(name)
    for step in range(4):
        rows = (torch.arange(11) + 11 * step) % POOL
        pool = pool.replaced(rows, images(11, generator))
        reward.pool_distance(pool)
    draws = [(torch.arange(6), images(12, generator).reshape(2, 6, DIM))]
    state = {key: tensor.clone() for key, tensor in reward.state_dict(pool).items()}
    other = make(name)
    other.load_state_dict(pool, state)
    next_rows, fresh = torch.arange(40, 60), images(20, generator)
    after = pool.replaced(next_rows, fresh)
    for scored in (pool, after):
        assert other.pool_distance(scored) == reward.pool_distance(scored)
        assert torch.equal(other.rewards(scored, draws), reward.rewards(scored, draws))
    # Without a state it starts afresh, and is right to rounding.
    anew = make(name)
    anew.load_state_dict(after, {})
    expected = reward.pool_distance(after)
    assert anew.pool_distance(after) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_reward_is_the_same_in_another_process(
    name: str, make: Make, pool: Pool, generator: torch.Generator
) -> None:
    # As RewardSum and SubsetReward hold it, with what was made of the pool and before that.
    draws = [(torch.arange(6), images(12, generator).reshape(2, 6, DIM))]
    reward = RewardSum([WeightedReward(name, 0.5, make(name), 0, DIM)])
    new = pickle.loads(pickle.dumps(reward))
    found = reward.rewards(pool, draws)
    used, own = pickle.loads(pickle.dumps((reward, pool)))
    assert torch.equal(new.rewards(pool, draws), found)
    assert torch.equal(used.rewards(own, draws), found)


@pytest.mark.parametrize("needy", NEEDS_FEATURES)
def test_moments_alone_are_refused_where_features_are_needed(needy: str) -> None:
    bare = Reference(stats=feature_stats(torch.eye(4)))
    message = rf"^real\.safetensors: {needy} compares with the features of real images"
    with pytest.raises(StatisticsError, match=message):
        resolve("reward", REWARDS, needy)(
            RewardSource(name=needy, reference=bare, path="real.safetensors")
        )
