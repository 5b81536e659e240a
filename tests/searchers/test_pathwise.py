"""The search along gradients: where it goes, how its step finds itself, how it comes back."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_rl.config.optimize import SearchConfig
from merge_rl.errors import ConfigError
from merge_rl.searchers import Pathwise, SearchSpace, Slope

OPTIMUM = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)


def searcher(
    rounds: int = 50, *, dim: int = 3, renewed: float = 0.1, **settings: float
) -> Pathwise:
    space = dataclasses.replace(SearchSpace.plain(dim, evaluations=rounds), renewed=renewed)
    return Pathwise(SearchConfig(name="pathwise", **settings), space, 0)  # type: ignore[arg-type]


def slope(theta: Tensor) -> Tensor:
    """The gradient of -|theta - optimum|^2."""
    return -2 * (theta - OPTIMUM)


def reward(theta: Tensor) -> Tensor:
    return -(theta - OPTIMUM).square().sum(-1)


def play(found: Pathwise, rounds: int) -> None:
    for _ in range(rounds):
        thetas = found.ask()
        found.tell(thetas, reward(thetas), Slope(gradients=slope(thetas)))


def test_the_first_step_is_short() -> None:
    # One gradient is a fifth of what Adam's mean of gradients remembers; three coordinates share
    # the length. A round that renews the whole pool begins at its mean.
    found = searcher(learning_rate=0.3, renewed=1)
    play(found, 1)
    torch.testing.assert_close(found.mean, 0.2 * 0.3 / math.sqrt(3) * OPTIMUM.sign())
    assert torch.equal(found.finalists["average"], found.mean)
    assert torch.equal(found.finalists["best"], torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("renewed", [1.0, 0.25, 0.1])
@pytest.mark.parametrize("dim", [2, 50])
def test_a_steady_gradient_moves_theta_by_the_step(dim: int, renewed: float) -> None:
    found = searcher(10**9, dim=dim, renewed=renewed, learning_rate=0.3)
    gradient = torch.linspace(-2, 3, dim, dtype=torch.float64)[None]
    for _ in range(120):
        before = found.mean
        found.tell(found.ask(), torch.zeros(1), Slope(gradients=gradient))
    moved = found.mean - before
    torch.testing.assert_close(float(moved.norm()), 0.3, rtol=1e-6, atol=0)
    assert torch.equal(moved.sign(), gradient[0].sign())


def test_a_quadratic_is_climbed_in_spite_of_noise() -> None:
    found, generator = searcher(rounds=120, learning_rate=0.7), torch.Generator().manual_seed(2)
    for _ in range(120):
        thetas = found.ask()
        noise = 2 * torch.randn(1, 3, generator=generator, dtype=torch.float64)
        found.tell(thetas, reward(thetas), Slope(gradients=slope(thetas) + noise, noise=0.1))
    assert float((found.mean - OPTIMUM).norm()) < 0.25
    assert float((found.finalists["average"] - OPTIMUM).norm()) < 0.25


@pytest.mark.parametrize("dim", [6, 120])
def test_a_pool_that_lags_does_not_make_it_swing(dim: int) -> None:
    # The gradient is that of the mean of the ten means that filled the pool, curvatures are
    # between 0.03 and 1, and the start is 2.8 from the optimum.
    curvature = torch.logspace(-1.5, 0, dim, dtype=torch.float64)
    found, optimum = (
        searcher(60, dim=dim, learning_rate=0.5),
        2.8 * torch.ones(dim).double() / math.sqrt(dim),
    )
    filled = [torch.zeros(dim, dtype=torch.float64)] * 10

    def loss(theta: Tensor) -> float:
        return float((curvature * (theta - optimum).square()).sum())

    seen = []
    for _ in range(60):
        thetas = found.ask()
        filled = [*filled[1:], thetas[0]]
        pool = torch.stack(filled).mean(0)
        gradient = -2 * curvature * (pool - optimum)
        told = Slope(gradients=gradient[None], noise=0.1)
        found.tell(thetas, -torch.tensor([loss(pool)]), told)
        seen.append(loss(found.mean))
    assert max(seen) <= loss(torch.zeros(dim).double())
    assert seen[-1] < 0.02 * seen[0]


def test_a_step_that_is_too_long_settles() -> None:
    # Means that ten rounds fill a pool with swing about an optimum that is 2 from the start.
    optimum = torch.ones(4).double()

    def loss(means: list[Tensor]) -> Tensor:
        return (torch.stack(means).mean(0) - optimum).square().sum()

    def swings(total: int, rounds: int) -> float:
        found, filled = searcher(total, dim=4), [torch.zeros(4).double()] * 10
        away = []
        for _ in range(rounds):
            thetas = found.ask()
            filled = [*filled[1:], thetas[0]]
            gradient = -2 * (torch.stack(filled).mean(0) - optimum)
            trend = float(loss(filled[:5]) - loss(filled[5:]))
            slope = Slope(gradients=gradient[None], noise=0.1, trend=trend)
            found.tell(thetas, -loss(filled)[None], slope)
            away.append(float((thetas[0] - optimum).norm()))
        return max(away[-10:])

    # The schedule ends the swings that the step, found again and again, goes on with.
    assert swings(120, 120) < 0.25 < swings(60, 60) < 1 < swings(10**9, 60)


def test_the_step_shrinks_to_the_end() -> None:
    ending = searcher(rounds=10)
    play(ending, 5)
    assert ending.step == pytest.approx(0.7 / math.sqrt(3) / 2)
    play(ending, 7)
    assert ending.step == pytest.approx(0.7 / math.sqrt(3) * 0.05)


def test_the_step_follows_from_what_it_led_to() -> None:
    # Halves that differ by sd have half a mean |difference| of sd / sqrt(2 pi).
    sd, found = 0.3, searcher(rounds=10**9)
    told, half = {"noise": sd / math.sqrt(2 * math.pi)}, sd * (0.5 + math.atanh(0.5))
    play(found, 1)
    lengths = []
    for trend in (sd / 2, half, -half, None):  # half an sd is chance
        climb(found, -1.0, trend=trend, **told)
        lengths.append(found.log_step)
    # A round renews a tenth: the newer half has 4, then 6 tenths of its images from the search.
    longer, shorter = 0.4 * 0.25 / 2, 0.6 * 0.3 / 2
    assert lengths == pytest.approx([0, longer, longer - shorter, longer - shorter])
    for bound, trend in ((math.log(16), 9.0), (-math.log(4), -9.0)):
        for _ in range(60):
            climb(found, -1.0, trend=trend, **told)
        assert found.log_step == pytest.approx(bound)
    silent = searcher()
    climb(silent, -1.0, trend=5.0)  # nothing is known of chance
    assert silent.log_step == 0


def test_one_wild_gradient_moves_no_further_than_others() -> None:
    a, b = searcher(), searcher()
    for found, factor in ((a, 1e9), (b, 3.0)):
        play(found, 3)
        thetas = found.ask()
        gradient = slope(thetas)
        along = gradient / gradient.norm() * found.norm
        found.tell(thetas, reward(thetas), Slope(gradients=factor * along))
    torch.testing.assert_close(a.mean, b.mean)


def test_without_a_finite_gradient_nothing_moves() -> None:
    found = searcher()
    play(found, 2)
    thetas, before, step = found.ask(), found.mean, found.step
    found.tell(thetas, reward(thetas))
    found.tell(thetas, reward(thetas), Slope(gradients=torch.full_like(thetas, math.nan)))
    found.tell(thetas, torch.tensor([math.nan]), Slope(gradients=slope(thetas)))
    assert torch.equal(found.mean, before)
    assert found.step == step
    with pytest.raises(ConfigError, match=r"expected gradients \(1, 3\) .* got \(1, 2\)"):
        found.tell(thetas, reward(thetas), Slope(gradients=torch.zeros(1, 2)))


def climb(found: Pathwise, level: float, **told: Any) -> None:
    """A round with a gradient that says nothing of the level."""
    ones = torch.ones(1, 3, dtype=torch.float64)
    found.tell(found.ask(), torch.tensor([level]).double(), Slope(gradients=ones, **told))


def test_a_search_that_gets_worse_goes_back_and_ends() -> None:
    found = searcher(rounds=10**9)
    for level in (-1.0, -0.5):
        climb(found, level)
    best = found.finalists["best"]  # the centre before the second round, which is the start
    assert torch.equal(best, torch.zeros(3).double())
    for _ in range(30):  # a tenth of the best distance is no news
        climb(found, -0.549)
    assert (found.returns, found.worse) == (0, 0)
    for _ in range(30):  # nor is what chance does
        climb(found, -0.7, noise=0.06)
    for _ in range(40):
        climb(found, -0.5)
    step = found.step
    for _ in range(9):
        climb(found, -0.7)
    returns = [found.returns]
    climb(found, -0.7)
    assert [*returns, found.returns] == [0, 1]
    assert torch.equal(found.mean, best)
    assert found.step == pytest.approx(step / 2, rel=1e-3)
    climb(found, -0.6)  # what is measured there anew counts from now on
    assert torch.equal(found.finalists["best"], best)
    ended = [found.done]
    for _ in range(10):
        climb(found, -0.8)
    assert [*ended, found.done] == [False, True]
    assert torch.equal(found.mean, best)


def test_the_second_metric_calls_it_back_to_where_that_was_best() -> None:
    found = searcher(rounds=10**9)
    climb(found, -1.0, second=(0.3, 0.01))
    for _ in range(4):
        climb(found, -1.0)
    climb(found, -0.9, second=(0.2, 0.01))
    there = found.finalists["best by second"]
    assert float(there.norm()) > 0
    for i in range(9):  # the reward gets better all the time
        climb(found, -0.8 + 0.01 * i, second=(0.5, 0.01) if i == 0 else None)
    assert found.returns == 0
    climb(found, -0.7)
    assert (found.returns, found.blamed) == (1, 1)
    assert torch.equal(found.mean, there)


def test_a_population_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected no population, got 4"):
        searcher(population=4)


@pytest.mark.parametrize("stop", [0, 1, 4, 17])
def test_a_restored_search_goes_on_to_the_bit(stop: int) -> None:
    whole, first, second = searcher(30), searcher(30), searcher(30)

    def live(found: Pathwise, rounds: range) -> None:
        for i in rounds:
            thetas = found.ask()
            level = reward(thetas) - (5 if 3 < i < 16 else 0)
            also = (0.1 * i, 0.02) if i % 4 == 0 else None
            found.tell(thetas, level, Slope(gradients=slope(thetas), noise=0.01, second=also))

    live(whole, range(24))
    live(first, range(stop))
    live(second, range(3))
    second.load_state_dict(first.state_dict())
    live(second, range(stop, 24))
    assert whole.returns == 1
    assert torch.equal(second.mean, whole.mean)
    assert second.state_dict()["scalars"] == whole.state_dict()["scalars"]
    for name, theta in whole.finalists.items():
        assert torch.equal(second.finalists[name], theta)
