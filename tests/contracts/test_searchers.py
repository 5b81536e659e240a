"""What every registered searcher promises, whatever its method."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from merge_rl.config.optimize import SearchConfig
from merge_rl.core.merging.linear_maps import FreeMap
from merge_rl.errors import ConfigError, RunError
from merge_rl.interfaces import Searcher
from merge_rl.registry import SEARCHERS, population_of, resolve_searcher
from merge_rl.searchers.base import SearchSpace

DIM = 5
EVALUATIONS = 600
OPTIMUM = torch.tensor([2.0, -1.0, 0.5, 3.0, -2.5], dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A searcher, settings to try it with, and which of the promises are its to keep."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    population: int | None = 12  # None where a method has its own: 1, or what is left to try
    climbs: float | None = 0.15  # |mean - optimum| / |optimum| in the end; None: not asked of it
    keeps: bool = False  # reports the best of what was tried
    draws: bool = True  # what it asks depends on the seed and is new in every round
    gradient: bool = False  # steps along a gradient, which can be damped
    restarts: bool = False  # goes on exactly from a new centre
    ends: bool = False  # is done by the time the evaluations are spent

    @property
    def key(self) -> str:
        family, colon, _ = self.name.partition(":")
        return family + colon


GIVEN: dict[str, Any] = {"population": None, "climbs": None, "draws": False, "ends": True}
CASES = [
    Case("policy-gradient", {"policy": "direct"}, gradient=True, restarts=True),
    Case("policy-gradient", {"update": "adam"}, gradient=True, restarts=True),
    Case("policy-gradient", {"policy": "mlp"}, gradient=True, restarts=True),
    Case(
        "policy-gradient",
        {"policy": "mlp", "learn_std": True, "epochs": 2, "top_fraction": 0.5},
        gradient=True,
        restarts=True,
    ),
    # What it learns from, gradients, no black box has: see tests/searchers/test_pathwise.py.
    Case("pathwise", population=None, climbs=None, draws=False),
    Case("nevergrad:CMA", restarts=True, keeps=True),
    Case("nevergrad:TBPSA", restarts=True),
    Case("nevergrad:OnePlusOne", population=1, restarts=True, keeps=True),
    Case("scipy:nelder-mead", population=None, restarts=True, keeps=True, draws=False, ends=True),
    Case("scipy:differential-evolution", restarts=True, keeps=True),
    Case("lr-cma", restarts=True),
    Case("lcsc", climbs=0.25, keeps=True, ends=True),
    Case("random", climbs=1.0, keeps=True, ends=True),
    Case("uniform", **GIVEN),
    Case("best-checkpoint", keeps=True, **GIVEN),
    Case("ema-grid", keeps=True, **GIVEN),
    Case("greedy-soup", **GIVEN),
]

Build = Callable[..., Searcher]
"""(dim=5, seed=0) -> a new searcher."""


def space(dim: int, evaluations: int = EVALUATIONS) -> SearchSpace:
    """Coefficients are theta itself; the checkpoints' places are known."""
    init = torch.zeros(dim, dtype=torch.float64)
    return SearchSpace(
        map=FreeMap(init=init, scale=1.0),
        names=tuple(f"checkpoint-{i}" for i in range(dim)),
        nimg=tuple(1000 * (1 + i // 2) for i in range(dim)),
        ema_std=tuple(0.05 + 0.05 * (i % 2) for i in range(dim)),
        evaluations=evaluations,
    )


def label(case: Case) -> str:
    return "-".join([case.name, *map(str, case.settings.values())])


def promised(name: str) -> pytest.MarkDecorator:
    """Run with those searchers alone of which the field of that name is expected."""
    return pytest.mark.parametrize("case", [c for c in CASES if getattr(c, name)], ids=label)


@pytest.fixture(params=CASES, ids=label)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture
def build(case: Case) -> Build:
    def make(dim: int = DIM, seed: int = 0) -> Searcher:
        return new(case, dim, seed)

    return make


def new(case: Case, dim: int, seed: int) -> Searcher:
    config = SearchConfig(name=case.name, population=case.population, **case.settings)
    searcher: Searcher = resolve_searcher(case.name)(config, space(dim), seed)
    return searcher


def quadratic(thetas: Tensor) -> Tensor:
    return -(thetas - OPTIMUM[: thetas.shape[1]]).square().sum(1)


def play(searcher: Searcher, rounds: int) -> None:
    for _ in range(rounds):
        if searcher.done:
            return
        thetas = searcher.ask()
        searcher.tell(thetas, quadratic(thetas))


def play_out(searcher: Searcher, evaluations: int = EVALUATIONS) -> tuple[Tensor, Tensor]:
    """All thetas that were asked until the evaluations are spent, and their rewards."""
    asked: list[Tensor] = [torch.empty(0, DIM, dtype=torch.float64)]
    while not searcher.done and sum(map(len, asked)) < evaluations:
        asked.append(searcher.ask())
        searcher.tell(asked[-1], quadratic(asked[-1]))
    thetas = torch.cat(asked)
    return thetas, quadratic(thetas)


@functools.cache
def played_out(number: int) -> tuple[Searcher, Tensor, Tensor]:
    """Searcher of CASES that has spent its evaluations, and `play_out`: to look at."""
    searcher = new(CASES[number], DIM, 1)
    return searcher, *play_out(searcher)


def test_every_registered_searcher_is_tried() -> None:
    assert {case.key for case in CASES} == set(SEARCHERS)


@pytest.mark.parametrize("dim", [1, 5])
def test_shapes_and_types(case: Case, build: Build, dim: int) -> None:
    searcher = build(dim)
    if not searcher.done:  # else its answer is known already
        assert torch.equal(searcher.mean, torch.zeros(dim, dtype=torch.float64))
    for round_index in range(3):
        if searcher.done:
            break
        thetas = searcher.ask()
        assert thetas.shape[1:] == (dim,)
        assert len(thetas) == case.population or case.population is None
        assert thetas.dtype == torch.float64
        assert bool(thetas.isfinite().all())
        # Of differential evolution, two of a later generation may agree.
        assert len(torch.unique(thetas, dim=0)) >= len(thetas) - round_index
        assert not thetas.requires_grad
        searcher.tell(thetas, quadratic(thetas))
    assert searcher.mean.shape == (dim,)
    assert searcher.mean.dtype == torch.float64
    assert bool(searcher.mean.isfinite().all())


def test_the_size_of_a_round_is_known_before(case: Case, build: Build) -> None:
    config = SearchConfig(name=case.name, population=case.population, **case.settings)
    least, searcher = population_of(config), build()
    if case.population is not None:
        assert least == case.population == len(searcher.ask())
    elif not searcher.done:
        assert 1 == least <= len(searcher.ask())


def test_asking_is_repeatable(case: Case, build: Build) -> None:
    searcher = build()
    for _ in range(3):
        if searcher.done:
            break
        thetas = searcher.ask()
        again = searcher.ask()
        assert torch.equal(again, thetas)
        again.add_(1)  # a copy
        assert torch.equal(searcher.ask(), thetas)
        searcher.tell(thetas, quadratic(thetas))
        if case.draws:
            assert not torch.equal(searcher.ask(), thetas)


@promised("draws")
def test_what_is_asked_follows_from_seed_and_rewards(case: Case, build: Build) -> None:
    a, b, other = build(seed=3), build(seed=3), build(seed=4)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    for round_index in range(3):
        b.ask()  # never counts
        torch.rand(5)  # the global generators play no part
        np.random.rand(5)  # noqa: NPY002
        assert torch.equal(a.ask(), b.ask())
        if round_index > 0 or case.population != 1:  # a serial one begins at its centre
            assert not torch.equal(a.ask(), other.ask())
        for searcher in (a, b, other):
            play(searcher, 1)
    assert torch.equal(a.mean, b.mean)
    assert case.population == 1 or not torch.equal(a.mean, other.mean)


def test_global_generators_are_left_alone(build: Build) -> None:
    numbers, state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    play(build(), 3)
    assert torch.equal(torch.get_rng_state(), numbers)
    after = np.random.get_state()  # noqa: NPY002
    assert str(after) == str(state)


@promised("climbs")
def test_a_quadratic_is_climbed(case: Case) -> None:
    searcher, _, _ = played_out(CASES.index(case))
    # From |optimum| = 4.5; the same 600 evaluations at random would not come near.
    assert case.climbs is not None
    assert float((searcher.mean - OPTIMUM).norm()) < case.climbs * float(OPTIMUM.norm())


@promised("keeps")
def test_the_best_that_was_tried_is_kept(case: Case) -> None:
    searcher, thetas, rewards = played_out(CASES.index(case))
    assert len(thetas) >= 0.9 * EVALUATIONS or searcher.done
    torch.testing.assert_close(quadratic(searcher.mean[None])[0], rewards.max())


def test_inputs_are_not_altered(build: Build) -> None:
    searcher = build()
    if not searcher.done:
        thetas = searcher.ask()
        rewards = quadratic(thetas)
        rewards[-1] = math.nan
        kept = thetas.clone(), rewards.clone()
        searcher.tell(thetas, rewards)
        assert torch.equal(thetas, kept[0])
        assert torch.equal(rewards.isnan(), kept[1].isnan())
    mean = searcher.mean
    mean.add_(100)
    searcher.finalists["mean"].add_(100)
    assert float(searcher.mean.abs().max()) < 100


def test_finalists(build: Build) -> None:
    searcher = build()
    for _ in range(6):
        finalists = searcher.finalists
        assert torch.equal(finalists["mean"], searcher.mean)
        assert len(finalists) <= 5
        for theta in finalists.values():
            assert theta.shape == (DIM,)
            assert theta.dtype == torch.float64
            assert bool(theta.isfinite().all())
        play(searcher, 1)


@promised("gradient")
def test_failed_candidates_repel(case: Case, build: Build) -> None:
    # Whatever lies on one side of 0 fails; the rest is flat. Never a step towards the failures.
    for seed in range(5):
        searcher = build(seed=seed)
        for _ in range(4):
            thetas = searcher.ask()
            rewards = torch.where(thetas[:, 0] > 0.3, math.nan, 1.0 + 0 * thetas[:, 0])
            # The failed ones count as the worst finite reward, which must not be the only one.
            rewards[thetas[:, 0].argmin()] = 2.0
            searcher.tell(thetas, rewards)
        assert float(searcher.mean[0]) < 0, seed
        assert bool(searcher.mean.isfinite().all())


@promised("keeps")
def test_a_failure_is_never_the_best(case: Case, build: Build) -> None:
    # The way to the optimum leads into the half-space that fails.
    searcher, tried = build(), 0
    while tried < 60 * 4 and not searcher.done:
        thetas = searcher.ask()
        tried += max(len(thetas), 4)
        searcher.tell(thetas, torch.where(thetas[:, 0] > 0.3, math.nan, quadratic(thetas)))
        assert float(searcher.mean[0]) <= 0.3
        for theta in searcher.finalists.values():
            assert bool(theta.isfinite().all())


@promised("gradient")
def test_a_failure_equals_the_worst_reward(case: Case, build: Build) -> None:
    a, b = build(), build()
    thetas = a.ask()
    rewards = quadratic(thetas)
    worst = float(rewards.min())
    for searcher, value in ((a, math.nan), (b, worst)):
        told = rewards.clone()
        told[rewards.argmax()] = value
        searcher.tell(thetas, told)
    assert torch.equal(a.mean, b.mean)


@pytest.mark.parametrize("value", [-math.inf, math.inf])
def test_what_is_not_finite_is_a_failure(build: Build, value: float) -> None:
    a, b = build(), build()
    for round_index in range(3):
        if a.done:
            break
        thetas = a.ask()
        for searcher, failure in ((a, math.nan), (b, value)):
            told = quadratic(thetas)
            told[round_index % len(told)] = failure
            searcher.tell(thetas, told)
        assert torch.equal(a.mean, b.mean)


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_lost_round_moves_nothing(case: Case, build: Build, rounds: int) -> None:
    searcher = build()
    play(searcher, rounds)
    if searcher.done:
        return
    thetas, before = searcher.ask(), searcher.mean
    searcher.tell(thetas, torch.full((len(thetas),), math.nan, dtype=torch.float64))
    assert torch.equal(searcher.mean, before)
    if case.draws:  # asking the same again would fail the same way for ever
        assert not torch.equal(searcher.ask(), thetas)
    if case.climbs is None:
        return
    # It is no setback: what comes after teaches as ever.
    first = quadratic(searcher.mean[None])[0]
    for _ in range(40):
        play(searcher, 1)
        if quadratic(searcher.mean[None])[0] > first:
            return
    pytest.fail("nothing better in 40 rounds")


@promised("gradient")
@pytest.mark.parametrize("rounds", [0, 2])
def test_a_flat_round_moves_nothing(case: Case, build: Build, rounds: int) -> None:
    searcher = build()
    play(searcher, rounds)
    thetas, before = searcher.ask(), searcher.mean
    searcher.tell(thetas, torch.full((12,), 0.7, dtype=torch.float64))
    assert torch.equal(searcher.mean, before)
    assert not torch.equal(searcher.ask(), thetas)
    play(searcher, 1)
    assert not torch.equal(searcher.mean, before)


def disturb(searcher: Searcher, round_index: int) -> None:
    """One round of a life with everything in it: steps, failures, damping, a new centre."""
    if searcher.done:
        return
    thetas = searcher.ask()
    rewards = quadratic(thetas)
    if round_index == 1:
        rewards[2 % len(rewards)] = math.nan
        searcher.damp(0.7)
    if round_index == 2:
        rewards[:] = math.nan
    searcher.tell(thetas, rewards)
    if round_index == 3:
        searcher.recenter(0.5 * searcher.mean)
    if round_index == 5:
        searcher.halve()


def through_files(state: dict[str, Any]) -> dict[str, Any]:
    """As a resume point does: copies of tensors, numbers as JSON text."""
    assert set(state) == {"tensors", "scalars"}
    assert all(isinstance(tensor, Tensor) for tensor in state["tensors"].values())
    scalars = json.loads(json.dumps(state["scalars"], allow_nan=False))
    return {"tensors": {k: v.clone() for k, v in state["tensors"].items()}, "scalars": scalars}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


class Moment(NamedTuple):
    """What a searcher is before a round."""

    asked: Tensor | None  # None when it is done
    mean: Tensor
    finalists: dict[str, Tensor]

    @classmethod
    def of(cls, searcher: Searcher) -> Moment:
        asked = None if searcher.done else searcher.ask()
        return cls(asked, searcher.mean, dict(searcher.finalists))


LIFE = 10


def test_a_restored_searcher_goes_on_exactly(build: Build) -> None:
    searcher, saved = build(seed=8), build(seed=8)
    whole, states = [], []
    for i in range(LIFE):  # of one that is never saved, and of another in the same life
        whole.append(Moment.of(searcher))
        states.append(through_files(saved.state_dict()))
        disturb(searcher, i)
        disturb(saved, i)
    for stop in (0, 2, 4, 6):  # new, after a failure, after a new centre, after halving
        second = build(seed=8)
        disturb(second, 0)  # what it did before does not matter
        second.load_state_dict(states[stop])
        for i in range(stop, LIFE):
            found, expected = Moment.of(second), whole[i]
            assert (found.asked is None) == (expected.asked is None)
            if found.asked is not None and expected.asked is not None:
                assert torch.equal(found.asked, expected.asked)
            assert torch.equal(found.mean, expected.mean)
            assert same(found.finalists, expected.finalists)
            disturb(second, i)


def test_a_saved_state_is_a_copy(build: Build) -> None:
    searcher = build()
    play(searcher, 2)
    state = searcher.state_dict()
    kept = {key: tensor.clone() for key, tensor in state["tensors"].items()}
    play(searcher, 2)
    assert same(state["tensors"], kept)


def test_another_seed_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match="seed"):
        build(seed=1).load_state_dict(build(seed=2).state_dict())


@promised("ends")
def test_what_is_done_asks_nothing(case: Case, build: Build) -> None:
    searcher, _, _ = played_out(CASES.index(case))
    assert searcher.done
    with pytest.raises(RunError, match="is done: nothing left to ask"):
        searcher.ask()
    restored = build(seed=1)
    restored.load_state_dict(through_files(searcher.state_dict()))
    assert restored.done
    assert torch.equal(restored.mean, searcher.mean)


def test_damped_steps_are_smaller(case: Case, build: Build) -> None:
    plain, damped = build(), build()
    damped.damp(0.5)
    play(plain, 1)
    play(damped, 1)
    if not case.gradient:  # there is no pool to lag behind
        assert torch.equal(damped.mean, plain.mean)
        return
    assert 0 < float(damped.mean.norm()) < float(plain.mean.norm())
    restored = build()
    restored.damp(0.5)
    restored.damp(4.0)  # caught up: back to the configured step, not beyond
    play(restored, 1)
    assert torch.equal(restored.mean, plain.mean)


def test_halving_narrows_the_draws(case: Case, build: Build) -> None:
    plain, halved = build(), build()
    if not plain.done:
        play(plain, 1)
        play(halved, 1)
    halved.halve()
    assert torch.equal(halved.mean, plain.mean)  # exploration, not the answer
    if case.population == 12:
        spreads = [float(s.ask().std(0).mean()) for s in (plain, halved)]
        assert 0.2 * spreads[0] < spreads[1] < 0.85 * spreads[0]


def test_a_search_begins_where_it_is_told(case: Case, build: Build) -> None:
    searcher = build()
    if searcher.done:
        return
    target = torch.tensor([40.0, -30.0, 20.0, 0.0, 50.0], dtype=torch.float64)
    searcher.recenter(target)
    assert torch.equal(searcher.mean, target)
    thetas = searcher.ask()
    if case.climbs is not None:
        assert float((thetas - target).norm(dim=1).min()) < 3
    restored = build()
    restored.load_state_dict(through_files(searcher.state_dict()))
    assert torch.equal(restored.mean, target)
    assert torch.equal(restored.ask(), thetas)


def test_recentring(case: Case, build: Build) -> None:
    searcher = build()
    play(searcher, 4)
    if searcher.done:
        return
    failed = searcher.mean
    target = torch.tensor([0.1, -0.2, 0.3, 0.0, 5.0], dtype=torch.float64)
    searcher.recenter(target)
    torch.testing.assert_close(searcher.mean, target, rtol=0, atol=1e-12)
    if case.restarts:
        # Proposals follow: the nearest is within a few standard deviations of the centre.
        assert float((searcher.ask() - target).norm(dim=1).min()) < 3
        play_out(searcher, EVALUATIONS // 2)
        assert float((searcher.mean - OPTIMUM).norm()) < 0.5 * float((target - OPTIMUM).norm())
        return
    # What made samples that are not finite is not the answer again.
    for _ in range(10):
        play(searcher, 1)
        assert not torch.equal(searcher.mean, failed)


def test_nothing_to_search_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 dimensions"):
        SearchSpace.plain(0)
