"""Random search: where it draws, how it splits the budget, and that luck does not win."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from merge_rl.config.optimize import SearchConfig
from merge_rl.rng import stream
from merge_rl.searchers.base import SearchSpace
from merge_rl.searchers.random_search import RandomSearch, random_plan


def build(dim: int = 3, evaluations: int = 160, seed: int = 0, **settings: Any) -> RandomSearch:
    config = SearchConfig(name="random", **settings)
    return RandomSearch(config, SearchSpace.plain(dim, evaluations), seed)


@pytest.mark.parametrize(
    ("evaluations", "plan"),
    [(160, (80, 16, 80)), (40, (20, 5, 20)), (3, (2, 2, 2)), (1, (2, 2, 2)), (361, (180, 16, 181))],
)
def test_random_plan(evaluations: int, plan: tuple[int, int, int]) -> None:
    assert random_plan(evaluations) == plan


def test_draws_are_gaussian_around_the_start() -> None:
    searcher = build(dim=4, evaluations=8000, population=4000, std=0.5)
    thetas = searcher.ask()
    assert thetas[0].tolist() == [0.0] * 4
    assert float(thetas.std()) == pytest.approx(0.5, rel=0.05)
    assert float(thetas.mean()) == pytest.approx(0, abs=5 * 0.5 / math.sqrt(16000))


def test_the_budget_is_kept() -> None:
    searcher, asked = build(population=12), []
    while not searcher.done:
        thetas = searcher.ask()
        asked.append(len(thetas))
        searcher.tell(thetas, -thetas.square().sum(1))
    # 80 draws in rounds of 12. The finals have 80 more: 16 for a round of 16, a third of the other
    # 64 for 2 of 8, half of the other 48 for 6 of 4, and the last 24 for 12 of 2.
    assert asked == [12] * 6 + [8] + [16] + [8] * 2 + [4] * 6 + [2] * 12
    assert sum(asked) == 160
    assert searcher.mean.tolist() == [0.0] * 3  # the start is a draw, here the best one


def test_the_luckiest_draw_is_seen_through() -> None:
    # The first draws' rewards are noise alone, their order when tried again is the truth.
    searcher, finals = build(evaluations=64), 0
    truth = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    noise = stream(3, "noise")
    while not searcher.done:
        thetas = searcher.ask()
        lucky = torch.randn(len(thetas), generator=noise, dtype=torch.float64) + 100
        drawing = searcher.rounds < 2  # 32 draws, then 8 finalists
        if searcher.rounds == 2:
            finalists, leader = thetas, searcher.mean
        finals += 0 if drawing else len(thetas)
        searcher.tell(thetas, lucky if drawing else thetas @ truth)
    assert finals == 32 - 32 % 2
    assert len(finalists) == 8
    best = finalists[(finalists @ truth).argmax()]
    assert not torch.equal(leader, best)
    assert torch.equal(searcher.mean, best)
