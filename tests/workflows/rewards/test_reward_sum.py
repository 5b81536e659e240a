"""Sums of rewards: weights, columns, failures, what is saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from merge_rl.workflows.rewards.frechet import Pool
from merge_rl.workflows.rewards.sum import CombinedExtractor, RewardSum, WeightedReward

pytestmark = pytest.mark.numerics


class Column:
    """Minus the mean of the features it is shown; notes the pools it sees."""

    def __init__(self) -> None:
        self.pools: list[Pool] = []
        self.loaded: list[dict[str, Tensor]] = []

    def pool_distance(self, pool: Pool) -> float:
        self.pools.append(pool)
        return float(pool.features.mean())

    def rewards(self, pool: Pool, draws: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        self.pools.append(pool)
        return -torch.stack([f.double().mean((1, 2)) for _, f in draws]).mean(0)

    def state_dict(self, pool: Pool) -> dict[str, Tensor]:
        return {"sum": pool.features.sum()}

    def load_state_dict(self, pool: Pool, state: Mapping[str, Tensor]) -> None:
        self.loaded.append(dict(state))


@pytest.fixture
def parts() -> tuple[Column, Column]:
    return Column(), Column()


@pytest.fixture
def total(parts: tuple[Column, Column]) -> RewardSum:
    return RewardSum(
        [WeightedReward("a", 2.0, parts[0], 0, 1), WeightedReward("b", 0.5, parts[1], 1, 3)]
    )


@pytest.fixture
def pool() -> Pool:
    features = torch.tensor([[1.0, 10, 30], [3, 20, 40], [8, 10, 10]])
    return Pool.of(features, torch.zeros(3, dtype=torch.int64))


def test_terms_are_weighted(total: RewardSum, pool: Pool) -> None:
    # Columns 0 and 1..2: means 4 and 20, so the pool is at 2 * 4 + 20 / 2.
    assert total.pool_distance(pool) == pytest.approx(18)
    rows = torch.tensor([0, 2])
    features = torch.tensor([[[1.0, 2, 3], [3, 4, 5]], [[0, 0, 0], [0, 8, 8]]])
    rewards, terms, _ = total.scores(pool, [(rows, features)])
    assert terms["a"].tolist() == [-2, 0]
    assert terms["b"].tolist() == [-3.5, -4]
    assert rewards.tolist() == [-5.75, -2]
    assert total.rewards(pool, [(rows, features)]).tolist() == [-5.75, -2]


def test_a_failed_term_fails_the_sum(total: RewardSum, pool: Pool) -> None:
    features = torch.ones(2, 1, 3)
    features[1, 0, 2] = math.nan
    rewards, terms, _ = total.scores(pool, [(torch.tensor([1]), features)])
    assert rewards.isnan().tolist() == [False, True]
    assert not bool(terms["a"].isnan().any())


def test_a_pool_looks_the_same_until_it_changes(
    total: RewardSum, parts: tuple[Column, Column], pool: Pool
) -> None:
    draws = [(torch.tensor([1]), torch.ones(2, 1, 3))]
    total.pool_distance(pool)
    total.scores(pool, draws)
    assert parts[1].pools[0] is parts[1].pools[1]
    assert parts[1].pools[0].features.tolist() == [[10, 30], [20, 40], [10, 10]]
    total.pool_distance(pool.replaced(torch.tensor([1]), torch.tensor([[0.0, 1, 2]])))
    assert parts[1].pools[2].features.tolist() == [[10, 30], [1, 2], [10, 10]]


def test_terms_keep_their_own_state(
    total: RewardSum, parts: tuple[Column, Column], pool: Pool
) -> None:
    state = total.state_dict(pool)
    assert {name: float(value) for name, value in state.items()} == {"0.sum": 12, "1.sum": 120}
    total.load_state_dict(pool, state)
    assert [list(part.loaded[0]) for part in parts] == [["sum"], ["sum"]]
    assert float(parts[1].loaded[0]["sum"]) == 120
    total.load_state_dict(pool, {})
    assert [part.loaded[1] for part in parts] == [{}, {}]


def test_combined_features_lie_side_by_side() -> None:
    class Flat:
        name, dim = "flat", 4

        def __call__(self, images: Tensor) -> Tensor:
            return images.flatten(1).float()

    class Mean:
        name, dim = "mean", 1

        def __call__(self, images: Tensor) -> Tensor:
            return images.double().mean((1, 2, 3))[:, None]

    both = CombinedExtractor([Flat(), Mean()])
    assert (both.name, both.dim) == ("flat+mean", 5)
    images = torch.tensor([[[[1, 2], [3, 6]]], [[[0, 0], [0, 4]]]], dtype=torch.uint8)
    features = both(images)
    assert features.dtype == torch.float32
    assert features.tolist() == [[1, 2, 3, 6, 3], [0, 0, 0, 4, 1]]
