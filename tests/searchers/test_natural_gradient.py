"""The natural policy gradient: its step, its schedule and its running average, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_rl.config.optimize import SearchConfig
from merge_rl.core.merging.linear_maps import FreeMap
from merge_rl.errors import ConfigError, UnknownNameError
from merge_rl.searchers.base import SearchSpace
from merge_rl.searchers.natural_gradient import NaturalGradient, scaled_to
from merge_rl.searchers.policy_gradient import PolicyGradient, policy_gradient

F64 = torch.float64


def make(dim: int = 2, evaluations: int = 1000, seed: int = 0, **settings: Any) -> NaturalGradient:
    settings = {"population": 4, "min_decay": 0.1, **settings}
    space = SearchSpace.plain(dim, evaluations)
    return NaturalGradient(SearchConfig(**settings), space, seed)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def test_one_step_by_hand() -> None:
    searcher = make(dim=1, momentum=0.7, std=2.0)
    # z = 1, -1, 0.5, -0.5 with rewards 3, -1, 1, 1: advantages (2, -2, 0, 0) / sqrt(2).
    thetas = column(2, -2, 1, -1)[:, None]
    searcher.tell(thetas, column(3, -1, 1, 1))
    # E[A z] = (sqrt 2 + sqrt 2) / 4; the first momentum is that of no history; times std.
    expected = 2 * math.sqrt(2) / 2
    assert float(searcher.mean) == pytest.approx(expected)


def test_momentum_and_damping_by_hand() -> None:
    searcher = make(dim=1, momentum=0.5, learning_rate=0.5, evaluations=10**9)
    thetas, rewards = column(1, -1)[:, None], column(1, -1)
    searcher.tell(thetas, rewards)  # gradient 1
    assert float(searcher.mean) == pytest.approx(0.5)
    searcher.damp(0.5)
    # Around the new mean: z = 1, -1 with the worse one ahead: gradient -1.
    searcher.tell(thetas + 0.5, -rewards)
    # Momentum 0.5 * 0.5 - 0.5 = -0.25, over 1 - 0.25; half the step.
    assert float(searcher.mean) == pytest.approx(0.5 - 0.25 * 0.25 / 0.75, rel=1e-6)


def test_the_step_is_at_most_the_exploration_on_a_slope() -> None:
    slope = torch.randn(6, generator=torch.Generator().manual_seed(3), dtype=F64)
    lengths = []
    for seed in range(20):
        # Six orthogonal pairs: the slope is measured exactly.
        searcher = make(dim=6, population=12, seed=seed, momentum=0.0, std=0.3)
        thetas = searcher.ask()
        searcher.tell(thetas, 1e6 * (thetas @ slope))  # whatever the unit of the reward
        lengths.append(float(searcher.mean.norm()))
        assert float(torch.cosine_similarity(searcher.mean, slope, dim=0)) > 1 - 1e-9
    assert lengths == pytest.approx([0.3] * 20)


def test_few_dimensions_keep_their_settings() -> None:
    # 5 groups of 7 coefficients, the default of 8 checkpoints.
    assert scaled_to(35, 7) == (16, 1.0, 1.0)
    # 8 directions of 128: steps keep half of their length; 64 coefficients move each weight.
    assert scaled_to(128, 64) == (16, 0.5, 0.5)
    # Beyond, an eighth as many candidates as dimensions, up to 128; a population that is named
    # stays, and the step follows from it.
    assert scaled_to(441, 16) == (56, 8 * 28 / 441, 1.0)
    assert scaled_to(10_000, 16).population == 128
    assert scaled_to(441, 16, population=100) == (100, 8 * 50 / 441, 1.0)


@pytest.mark.parametrize("distance", [1.0, 6.0, 21.0])
def test_many_dimensions_do_not_lead_away(distance: float) -> None:
    dim, evaluations = 441, 560
    found = scaled_to(dim, dim)
    space = SearchSpace(
        map=FreeMap(init=torch.zeros(dim, dtype=F64), scale=found.exploration),
        names=tuple(map(str, range(dim))), evaluations=evaluations,
    )  # fmt: skip
    config = SearchConfig(population=found.population, learning_rate=found.step)
    searcher = NaturalGradient(config, space, 0)
    target = torch.randn(dim, generator=torch.Generator().manual_seed(1), dtype=F64)
    target *= distance / target.norm()

    def loss(theta: Tensor) -> float:
        return float((space.coefficients(theta)[0] - target).square().sum())

    for _ in range(evaluations // found.population):
        thetas = searcher.ask()
        searcher.tell(thetas, column(*(-loss(theta) for theta in thetas)))
    assert max(loss(t) for t in searcher.finalists.values()) < distance**2


def test_exploration_shrinks_with_the_budget() -> None:
    searcher = make(evaluations=40, std=2.0, min_decay=0.25)
    seen = []
    for _ in range(12):
        seen.append(float(searcher.std[0]))
        searcher.tell(searcher.ask(), torch.zeros(4))
    # 4 of 40 a round: 1, 0.9, 0.8, ... down to 0.25 of it.
    expected = [2 * max(1 - 0.1 * k, 0.25) for k in range(12)]
    assert seen == pytest.approx(expected)


def test_exploration_widens_where_gradients_agree() -> None:
    def width_after(*signs: int, **settings: Any) -> float:
        searcher = make(dim=1, momentum=0.5, evaluations=10**12, **settings)
        for sign in signs:
            rewards = column(sign, -sign)
            searcher.tell(searcher.mean + searcher.std * column(1, -1)[:, None], rewards)
        return math.log(float(searcher.std))

    # Gradients of 1 weigh 1/3 and 2/3. Independent ones would sum to sqrt(5) / 3 in root mean
    # square, and a normal number's size is 0.798 of that on average.
    agreed, not_agreed = 3 / math.sqrt(5) / 0.798, 1 / math.sqrt(5) / 0.798
    assert width_after(1) == pytest.approx(0, abs=1e-9)
    assert width_after(1, 1) == pytest.approx(0.3 * (agreed - 1), rel=2e-3)
    assert width_after(1, -1) == pytest.approx(0.3 * (not_agreed - 1), rel=2e-3)
    assert width_after(1, -1, width_rate=1.0) == pytest.approx(not_agreed - 1, rel=2e-3)
    assert width_after(1, 1, width_rate=0.0) == pytest.approx(0, abs=1e-9)
    # No run of luck takes the exploration beyond eight times the configured one.
    assert width_after(*[1] * 60) == pytest.approx(math.log(8))


def test_a_new_centre_ends_a_wider_exploration() -> None:
    searcher = make(dim=1, evaluations=10**12)
    for _ in range(6):
        searcher.tell(searcher.mean + searcher.std * column(1, -1)[:, None], column(1, -1))
    assert float(searcher.std) > 1.5
    searcher.recenter(column(0))
    assert float(searcher.std) == pytest.approx(1.0)


def test_exploration_stays_where_gradients_are_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    widths = []
    for seed in range(100):
        searcher = make(dim=8, population=16, evaluations=10**12, seed=seed)
        for _ in range(12):
            rewards = torch.randn(16, generator=generator, dtype=F64)
            searcher.tell(searcher.ask(), rewards)
        widths.append(math.log(float(searcher.std[0])))
    # Each wanders by 0.4 or so, their mean by 0.04: a drift of 1 % a round would show.
    assert abs(sum(widths) / len(widths)) < 0.1


def test_the_average_forgets_the_beginning() -> None:
    # Weights 4 / (t + 3): 1, 4/5, 4/6, ...
    searcher = make(dim=1, momentum=0.0, learning_rate=1.0, evaluations=10**9)
    means, average = [], 0.0
    for t in range(1, 6):
        centre = searcher.mean
        searcher.tell(centre + column(1, -1)[:, None], column(1, -1))
        means.append(float(searcher.mean))
        average += 4 / (t + 3) * (means[-1] - average)
    assert means == pytest.approx([1, 2, 3, 4, 5], rel=1e-6)
    assert float(searcher.finalists["average"]) == pytest.approx(average, rel=1e-6)
    assert set(searcher.finalists) == {"mean", "average"}


def test_learned_std_follows_the_spread_of_what_is_good() -> None:
    wide, narrow = make(dim=1, learn_std=True), make(dim=1, learn_std=True)
    thetas = column(2, -2, 0.5, -0.5)[:, None]
    for _ in range(3):
        wide.tell(thetas + wide.mean, column(1, 1, 0, 0))
        narrow.tell(thetas + narrow.mean, column(0, 0, 1, 1))
    assert float(wide.std) > float(narrow.std)
    fixed = make(dim=1)
    fixed.tell(thetas, column(1, 1, 0, 0))
    assert float(fixed.std) == pytest.approx(1 - 4 / 1000)


def test_failed_rounds_teach_nothing_and_halve() -> None:
    searcher = make()
    before = searcher.std
    searcher.tell(searcher.ask(), torch.full((4,), math.nan))
    searcher.halve()
    assert searcher.mean.tolist() == [0, 0]
    torch.testing.assert_close(searcher.std, before / 2 * (1 - 4 / 1000))


def test_a_new_beginning() -> None:
    searcher = make()
    searcher.recenter(column(3, -1))
    assert searcher.mean.tolist() == searcher.finalists["average"].tolist() == [3, -1]
    thetas = searcher.ask()
    torch.testing.assert_close(thetas.mean(0), column(3, -1))  # antithetic pairs
    searcher.tell(thetas, thetas[:, 0])
    average = searcher.finalists["average"]
    searcher.recenter(column(0, 0))
    # Later it moves the mean alone; what was averaged stays.
    assert searcher.mean.tolist() == [0, 0]
    assert torch.equal(searcher.finalists["average"], average)


def test_damping_stays_in_bounds() -> None:
    searcher = make()
    for _ in range(20):
        searcher.damp(0.5)
    assert searcher.damping == 0.1
    for _ in range(20):
        searcher.damp(1.5)
    assert searcher.damping == 1.0


def test_which_update() -> None:
    space = SearchSpace.plain(2)

    def kind(**settings: Any) -> type:
        return type(policy_gradient(SearchConfig(**settings), space, 0))

    assert kind() is kind(update="natural") is NaturalGradient
    assert kind(policy="mlp") is kind(update="adam") is PolicyGradient
    with pytest.raises(ConfigError, match="the natural update needs the policy 'direct', got 'ml"):
        kind(policy="mlp", update="natural")
    with pytest.raises(UnknownNameError, match="did you mean 'direct'"):
        kind(policy="dirct")
    with pytest.raises(ConfigError, match="expected population >= 2, got 1"):
        policy_gradient.population_of(SearchConfig(population=1))


def test_another_seed_is_refused() -> None:
    with pytest.raises(ConfigError, match="belongs to another seed"):
        make(seed=1).load_state_dict(make(seed=2).state_dict())
