"""Credit for sets and for images, derived from the rewards of a pool."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from merge_rl.config.optimize import RewardConfig
from merge_rl.core.distances.statistics import feature_stats
from merge_rl.errors import ConfigError
from merge_rl.workflows.finetune.job import influence_name
from merge_rl.workflows.finetune.step import assign_credit, image_rewards, relative_gap
from merge_rl.workflows.reference.formats import Reference
from merge_rl.workflows.rewards.frechet import InfluenceFrechet, Pool, RewardSource, SubsetFrechet
from merge_rl.workflows.rewards.sum import RewardSum, WeightedReward

pytestmark = pytest.mark.numerics

DIM, SIZE = 4, 6


@pytest.fixture
def pool(generator: torch.Generator) -> Pool:
    return Pool.of(torch.randn(60, DIM, generator=generator), torch.arange(60) % 3)


@pytest.fixture
def source(generator: torch.Generator) -> RewardSource:
    real = 0.8 * torch.randn(200, DIM, generator=generator) + 0.5
    return RewardSource(name="fid", reference=Reference(stats=feature_stats(real)))


@pytest.fixture
def features(generator: torch.Generator) -> Tensor:
    return torch.randn(5, SIZE, DIM, generator=generator) + torch.arange(5.0)[:, None, None] / 10


def sum_of(reward: SubsetFrechet | InfluenceFrechet) -> RewardSum:
    return RewardSum([WeightedReward("fid", 2.0, reward, 0, DIM)])


ROWS = torch.tensor([3, 10, 11, 25, 40, 59])


def test_a_set_shares_its_reward(pool: Pool, source: RewardSource, features: Tensor) -> None:
    reward = sum_of(SubsetFrechet(source))
    found = assign_credit(reward, pool, ROWS, features, credit="set", fraction=0.4)
    rewards = reward.rewards(pool, [(ROWS, features)])
    torch.testing.assert_close(found.rewards, rewards)
    expected = (rewards - rewards.mean()) / rewards.std(correction=0)
    torch.testing.assert_close(found.advantages.reshape(5, SIZE), expected[:, None].expand(5, SIZE))
    best = rewards.topk(2).indices
    assert found.kept.reshape(5, SIZE).all(1).nonzero()[:, 0].tolist() == sorted(best.tolist())
    assert int(found.kept.sum()) == 2 * SIZE


def test_images_earn_what_they_change(pool: Pool, source: RewardSource, features: Tensor) -> None:
    reward = sum_of(InfluenceFrechet(source))
    own = image_rewards(reward, pool, ROWS, features)
    # Their mean is the set's reward, and one image's part is that of a set with it alone changed.
    torch.testing.assert_close(own.mean(1), reward.rewards(pool, [(ROWS, features)]))
    other = features.clone()
    other[:, 2] = features[0, 2]
    moved = reward.rewards(pool, [(ROWS, other)])
    difference = (own - image_rewards(reward, pool, ROWS, other))[:, 2] / SIZE
    torch.testing.assert_close(own.mean(1) - moved, difference)


def test_image_credit_ignores_what_stood_there(
    pool: Pool, source: RewardSource, features: Tensor
) -> None:
    reward = sum_of(InfluenceFrechet(source))
    found = assign_credit(reward, pool, ROWS, features, credit="per-image", fraction=0.2)
    per_row = found.advantages.reshape(5, SIZE)
    torch.testing.assert_close(per_row.mean(0), torch.zeros(SIZE).double(), atol=1e-12, rtol=0)
    assert float(found.advantages.square().mean()) == pytest.approx(1)
    assert found.advantages[found.kept].min() >= found.advantages[~found.kept].max()
    assert int(found.kept.sum()) == 6
    # Other rows of the pool: every image in a row loses or wins the same, which cancels.
    elsewhere = assign_credit(
        reward, pool, ROWS.flip(0) + 0, features, credit="per-image", fraction=0.2
    )
    torch.testing.assert_close(elsewhere.advantages, found.advantages)


def test_rewards_that_are_not_finite_are_told(
    pool: Pool, source: RewardSource, features: Tensor
) -> None:
    features[2, 1, 0] = torch.nan
    for credit, reward in (
        ("set", sum_of(SubsetFrechet(source))), ("per-image", sum_of(InfluenceFrechet(source))),
    ):  # fmt: skip
        found = assign_credit(reward, pool, ROWS, features, credit=credit, fraction=1.0)
        assert not found.finite
        assert found.rewards.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fid-subset", "fid-influence"),
        ("fid-influence", "fid-influence"),
        ("fid-subset + 0.25 * fd-dinov2-subset", "fid-influence + 0.25 * fd-dinov2-influence"),
    ],
)
def test_first_order_names(name: str, expected: str) -> None:
    assert influence_name(RewardConfig(name=name)) == expected


@pytest.mark.parametrize("name", ["kid-subset", "fid-full", "fid-subset + 0.1 * mmd-subset"])
def test_rewards_of_sets_alone_have_none_for_images(name: str) -> None:
    with pytest.raises(ConfigError, match="has none for single images"):
        influence_name(RewardConfig(name=name))


def test_gap_by_hand() -> None:
    # Sets of a tenth of the pool raise its distance of 4 by 0.1 on average: all of it, by 1.
    rewards = torch.tensor([-4.0, -4.2], dtype=torch.float64)
    assert relative_gap(4.0, rewards, 0.1) == pytest.approx(0.25)
    assert relative_gap(0.0, rewards, 0.1) == 0
