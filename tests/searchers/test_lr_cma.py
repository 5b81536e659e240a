"""CMA-ES with an adapted learning rate: its generations, noise, and a missing library."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch

from merge_rl.config.optimize import SearchConfig
from merge_rl.errors import ConfigError
from merge_rl.rng import stream
from merge_rl.searchers.base import SearchSpace
from merge_rl.searchers.lr_cma import LearningRateCMA
from tests.quick import Late

cmaes = Late("cmaes")
pytestmark = cmaes.needed()
OPTIMUM = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)


def build(seed: int = 0, **settings: Any) -> LearningRateCMA:
    config = SearchConfig(name="lr-cma", **settings)
    return LearningRateCMA(config, SearchSpace.plain(3), seed)


def test_a_round_is_a_generation_of_the_library() -> None:
    searcher = build(population=8, std=0.7)
    own = cmaes.CMA(
        mean=np.zeros(3), sigma=0.7, population_size=8, lr_adapt=True, seed=searcher._seed("cma", 0)
    )
    for _ in range(6):
        draws = np.stack([own.ask() for _ in range(8)])
        thetas = searcher.ask()
        np.testing.assert_array_equal(thetas.numpy(), draws)
        rewards = -(thetas - OPTIMUM).square().sum(1)
        own.tell([(draw, -reward) for draw, reward in zip(draws, rewards.tolist(), strict=True)])
        searcher.tell(thetas, rewards)
        np.testing.assert_array_equal(searcher.mean.numpy(), own.mean)


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_averaged_out(seed: int) -> None:
    # Noise of standard deviation 2, as large as a step of one unit near the optimum is worth.
    searcher, noise = build(seed=seed), stream(seed, "noise")
    for _ in range(120):
        thetas = searcher.ask()
        error = 2 * torch.randn(16, generator=noise, dtype=torch.float64)
        searcher.tell(thetas, -(thetas - OPTIMUM).square().sum(1) + error)
    assert float((searcher.mean - OPTIMUM).norm()) < 0.3 * float(OPTIMUM.norm())


def test_a_collapsed_covariance_begins_again() -> None:
    searcher = build(population=6)
    for _ in range(700):
        thetas = searcher.ask()
        assert bool(thetas.isfinite().all())
        searcher.tell(thetas, -(thetas - OPTIMUM).square().sum(1))
    torch.testing.assert_close(searcher.mean, OPTIMUM, rtol=0, atol=1e-6)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(
        ConfigError, match=r"needs the library cmaes, .*; pip install 'merge_rl\[search"
    ):
        build()
