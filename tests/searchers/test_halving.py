"""Successive halving and the methods that are nothing else, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from merge_rl.config.optimize import SearchConfig
from merge_rl.core.merging.linear_maps import AffineMap, FreeMap
from merge_rl.core.merging.maps import EmaMap, SoftmaxMap, make_map
from merge_rl.errors import ConfigError
from merge_rl.searchers.base import SearchSpace
from merge_rl.searchers.baselines import BestCheckpoint, Uniform
from merge_rl.searchers.halving import Halving, HalvingRound, halving_rounds

NAN = math.nan


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("count", "evaluations", "plan"),
    [
        (1, 100, []),
        (2, 7, [(2, 3)]),
        # 120 for each of three rungs.
        (8, 360, [(8, 15), (4, 30), (2, 60)]),
        # 25 each: 3 rounds of 7 cost 21; of the other 54, 27 buy 6 of 4; 30 are left for 2.
        (7, 75, [(7, 3), (4, 6), (2, 15)]),
        # Not even one round of all: the plan asks for it all the same.
        (5, 3, [(5, 1), (3, 1), (2, 1)]),
    ],
)
def test_halving_plan(count: int, evaluations: int, plan: list[tuple[int, int]]) -> None:
    found = halving_rounds(count, evaluations)
    assert found == [HalvingRound(*rung) for rung in plan]
    if evaluations >= 2 * count * max(1, len(plan)):
        assert sum(size * rounds for size, rounds in plan) <= evaluations


def test_the_better_half_climbs_by_mean_reward() -> None:
    halving = Halving(4, 16)
    assert halving.plan == [HalvingRound(4, 2), HalvingRound(2, 4)]
    halving.tell(vector(1.0, 9.0, 4.0, 0.0))
    assert halving.ranking == [1, 2, 0, 3]
    assert halving.alive.tolist() == [0, 1, 2, 3]
    halving.tell(vector(8.0, 2.0, 6.0, 0.0))  # means 4.5, 5.5, 5, 0
    assert halving.alive.tolist() == [1, 2]
    assert (halving.rung, halving.rounds) == (1, 0)
    for rewards in ((1.0, 2.0), (1.0, 2.0), (1.0, 2.0)):
        halving.tell(vector(*rewards))
    assert halving.ranking == [2, 1]  # 16 / 5 and 14 / 5: what was told before counts on
    halving.tell(vector(9.0, 1.0))  # 23 / 6 and 17 / 6
    assert halving.done
    assert halving.alive.tolist() == [1]
    assert halving.values[1] == pytest.approx(23 / 6)


def test_failures_are_out_and_lost_rounds_count_for_none() -> None:
    halving = Halving(3, 1)
    halving.tell(vector(NAN, 1.0, 2.0))
    assert halving.alive.tolist() == [1, 2]
    halving.tell(vector(NAN, NAN))
    assert halving.done
    assert halving.ranking == [2]
    halving = Halving(2, 4)
    halving.tell(vector(NAN, 1.0))
    halving.tell(vector(9.0, 1.0))  # one failure is enough
    assert halving.ranking == [1]
    halving = Halving(2, 2)
    halving.tell(vector(NAN, NAN))
    assert halving.done
    assert halving.ranking == []


def space(kind: str = "affine", checkpoints: int = 4, evaluations: int = 16) -> SearchSpace:
    init = torch.zeros(checkpoints, dtype=torch.float64)
    init[-1] = 1
    made = make_map(
        kind, num_checkpoints=checkpoints, base=checkpoints - 1, scale=0.05, init=init,
        nimg=range(100, 100 + checkpoints), ema_std=[0.1] * checkpoints,
    )  # fmt: skip
    names = tuple("abcdefgh"[:checkpoints])
    return SearchSpace(map=made, names=names, evaluations=evaluations)


def test_best_checkpoint_tries_single_checkpoints() -> None:
    problem = space()
    assert isinstance(problem.map, AffineMap)
    searcher = BestCheckpoint(SearchConfig(name="best-checkpoint"), problem, 0)
    thetas = searcher.ask()
    rows = torch.stack([problem.coefficients(theta)[0] for theta in thetas])
    torch.testing.assert_close(rows, torch.eye(4, dtype=torch.float64))
    assert searcher.mean.tolist() == [0.0, 0.0, 0.0]  # the start, while nothing is known
    searcher.tell(thetas, vector(1.0, 3.0, 2.0, 0.0))
    assert torch.equal(searcher.mean, thetas[1])
    assert list(searcher.finalists) == ["mean", "c", "a", "d"]
    searcher.tell(thetas, vector(1.0, 3.0, 2.0, 0.0))
    assert torch.equal(searcher.ask(), thetas[1:3])
    searcher.recenter(torch.zeros(3))  # the samples of "b" were not finite
    searcher.tell(searcher.ask(), vector(3.0, 2.0))
    assert torch.equal(searcher.mean, thetas[2])


def test_a_single_checkpoint_is_best_at_once() -> None:
    problem = space("free", checkpoints=1)
    searcher = BestCheckpoint(SearchConfig(name="best-checkpoint"), problem, 0)
    assert searcher.done
    assert problem.coefficients(searcher.mean).tolist() == [[1.0]]


@pytest.mark.parametrize("kind", ["affine", "free", "softmax"])
@pytest.mark.parametrize("checkpoints", [2, 5])
def test_uniform(kind: str, checkpoints: int) -> None:
    problem = space(kind, checkpoints)
    searcher = Uniform(SearchConfig(name="uniform"), problem, 0)
    searcher.recenter(torch.ones(problem.dim))  # where it begins does not matter
    expected = torch.full((1, checkpoints), 1 / checkpoints, dtype=torch.float64)
    torch.testing.assert_close(problem.coefficients(searcher.mean), expected)


def test_maps_that_do_not_reach_the_candidates() -> None:
    assert isinstance(space("softmax").map, SoftmaxMap)
    message = r"best-checkpoint needs .* the softmax map reaches rows above 0 .*; choose the map wh"
    with pytest.raises(ConfigError, match=message):
        BestCheckpoint(SearchConfig(name="best-checkpoint"), space("softmax"), 0)
    assert isinstance(space("ema").map, EmaMap)
    with pytest.raises(ConfigError, match=r"uniform needs .* the ema map reaches EMA profiles al"):
        Uniform(SearchConfig(name="uniform"), space("ema"), 0)
    # A start that sums to 2: the affine map keeps that.
    init = vector(1.0, 1.0)
    double = SearchSpace(map=AffineMap(init=init, scale=1.0, base=1), names=("a", "b"))
    with pytest.raises(ConfigError, match=r"uniform needs .* keeps the sum 2 of a row"):
        Uniform(SearchConfig(name="uniform"), double, 0)


def test_groups_share_the_candidate() -> None:
    init = torch.zeros(3, dtype=torch.float64)
    problem = SearchSpace(map=FreeMap(init=init, scale=0.5, num_groups=2), names=("a", "b", "c"))
    thetas = BestCheckpoint(SearchConfig(name="best-checkpoint"), problem, 0).ask()
    assert thetas.shape == (3, 6)
    assert problem.coefficients(thetas[1]).tolist() == [[0.0, 1.0, 0.0]] * 2
