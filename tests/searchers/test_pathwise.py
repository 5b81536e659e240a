"""The search along gradients: where it goes, how its step finds itself, how it comes back."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from merge_rl.config.optimize import SearchConfig
from merge_rl.errors import ConfigError
from merge_rl.searchers import Pathwise, SearchSpace

OPTIMUM = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)


def searcher(rounds: int = 50, seed: int = 0, **settings: float) -> Pathwise:
    space = SearchSpace.plain(3, evaluations=rounds)
    return Pathwise(SearchConfig(name="pathwise", **settings), space, seed)  # type: ignore[arg-type]


def slope(theta: Tensor) -> Tensor:
    """The gradient of -|theta - optimum|^2."""
    return -2 * (theta - OPTIMUM)


def reward(theta: Tensor) -> Tensor:
    return -(theta - OPTIMUM).square().sum(-1)


def play(
    found: Pathwise, rounds: int, lag: Callable[[int], float] = lambda _i: 0.0, noise: float = 0.0
) -> None:
    for i in range(rounds):
        thetas = found.ask()
        found.tell(thetas, reward(thetas), slope(thetas), lag(i), noise)


def test_the_first_step_is_adams() -> None:
    # Bias-corrected, the first step is the rate towards the optimum in every coordinate.
    found = searcher(learning_rate=0.3)
    play(found, 1)
    torch.testing.assert_close(found.mean, 0.3 * OPTIMUM.sign())
    assert torch.equal(found.finalists["average"], found.mean)
    assert torch.equal(found.finalists["best"], torch.zeros(3, dtype=torch.float64))


def test_a_quadratic_is_climbed_in_spite_of_noise() -> None:
    found, generator = searcher(rounds=120), torch.Generator().manual_seed(2)
    for _ in range(120):
        thetas = found.ask()
        noise = 2 * torch.randn(1, 3, generator=generator, dtype=torch.float64)
        found.tell(thetas, reward(thetas), slope(thetas) + noise, 0.0, 0.1)
    assert float((found.mean - OPTIMUM).norm()) < 0.25
    assert float((found.finalists["average"] - OPTIMUM).norm()) < 0.25


@pytest.mark.parametrize(("lag", "factor"), [(-9.0, 1.1), (9.0, 1 / 1.1), (0.0, 1.0)])
def test_the_lag_of_the_pool_sets_the_step(lag: float, factor: float) -> None:
    found = searcher(rounds=10**9)
    before = found.step
    play(found, 11, lambda _i: lag)
    # Ten of eleven rounds count: in the first there is nothing that could lag.
    assert found.step / before == pytest.approx(math.exp(math.copysign(1, -lag) * (lag != 0)), 1e-3)
    assert (found.step > before) == (factor > 1)


def test_the_step_stays_within_its_range_and_shrinks_to_the_end() -> None:
    long, short = searcher(rounds=10**9), searcher(rounds=10**9)
    play(long, 60, lambda _i: -99.0, noise=99.0)
    play(short, 60, lambda _i: 99.0)
    assert long.step == pytest.approx(0.12 * 16, rel=1e-3)
    assert short.step == pytest.approx(0.12 / 32, rel=1e-3)
    ending = searcher(rounds=10)
    play(ending, 5)
    assert ending.step == pytest.approx(0.06)
    play(ending, 7)
    assert ending.step == pytest.approx(0.12 * 0.05)


def test_one_wild_gradient_moves_no_further_than_others() -> None:
    a, b = searcher(), searcher()
    for found, factor in ((a, 1e9), (b, 3.0)):
        play(found, 3)
        thetas = found.ask()
        gradient = slope(thetas)
        along = gradient / gradient.norm() * found.norm
        found.tell(thetas, reward(thetas), factor * along)
    torch.testing.assert_close(a.mean, b.mean)


def test_without_a_finite_gradient_nothing_moves() -> None:
    found = searcher()
    play(found, 2)
    thetas, before, step = found.ask(), found.mean, found.step
    found.tell(thetas, reward(thetas))
    found.tell(thetas, reward(thetas), torch.full_like(thetas, math.nan))
    found.tell(thetas, torch.tensor([math.nan]), slope(thetas))
    assert torch.equal(found.mean, before)
    assert found.step == step
    with pytest.raises(ConfigError, match=r"expected gradients \(1, 3\) .* got \(1, 2\)"):
        found.tell(thetas, reward(thetas), torch.zeros(1, 2))


def test_a_search_that_gets_worse_goes_back_and_ends() -> None:
    found = searcher(rounds=10**9)

    def tell(level: float, noise: float = 0.0) -> None:
        thetas = found.ask()
        found.tell(thetas, torch.tensor([level]).double(), torch.ones(1, 3).double(), 0.0, noise)

    for level in (-1.0, -0.5):
        tell(level)
    best = found.finalists["best"]
    assert best.tolist() == pytest.approx([0.12] * 3)
    for _ in range(30):  # a tenth of the best distance is no news
        tell(-0.549)
    assert (found.returns, found.worse) == (0, 0)
    for _ in range(30):  # nor is what chance does
        tell(-0.7, noise=0.06)
    assert found.finalists["best"].equal(best)
    found.noise, step = 0.0, found.step
    for _ in range(9):
        tell(-0.7)
    returns = [found.returns]
    tell(-0.7)
    returns.append(found.returns)
    assert returns == [0, 1]
    assert torch.equal(found.mean, best)
    assert found.step == pytest.approx(step / 2, rel=1e-3)
    ended = [found.done]
    for _ in range(10):
        tell(-0.7)
    assert [*ended, found.done] == [False, True]
    assert torch.equal(found.mean, best)


def test_a_population_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected no population, got 4"):
        searcher(population=4)


@pytest.mark.parametrize("stop", [0, 1, 4, 17])
def test_a_restored_search_goes_on_to_the_bit(stop: int) -> None:
    whole, first, second = searcher(30), searcher(30), searcher(30)
    lags = [0.3, -2.0, 1.5, -0.2]

    def live(found: Pathwise, rounds: range) -> None:
        for i in rounds:
            thetas = found.ask()
            level = reward(thetas) - (5 if 3 < i < 16 else 0)
            found.tell(thetas, level, slope(thetas), lags[i % 4], 0.01)

    live(whole, range(24))
    live(first, range(stop))
    live(second, range(3))
    second.load_state_dict(first.state_dict())
    live(second, range(stop, 24))
    assert whole.returns == 1
    assert torch.equal(second.mean, whole.mean)
    assert (second.step, second.best, second.noise) == (whole.step, whole.best, whole.noise)
    for name, theta in whole.finalists.items():
        assert torch.equal(second.finalists[name], theta)
