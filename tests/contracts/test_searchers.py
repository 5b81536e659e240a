"""What every registered searcher promises, whatever its method."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_rl.config import SearchConfig
from merge_rl.core.search_space import SearchSpace
from merge_rl.errors import ConfigError
from merge_rl.interfaces import Searcher
from merge_rl.registry import SEARCHERS, resolve_searcher

# Settings a searcher is tried with, beside its defaults.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "policy-gradient": [
        {"policy": "direct"},
        {"policy": "mlp"},
        {"policy": "mlp", "learn_std": True, "epochs": 2, "top_fraction": 0.5},
    ]
}
CASES = [(name, settings) for name in SEARCHERS for settings in VARIANTS.get(name, [{}])]
DIM = 5
OPTIMUM = torch.tensor([2.0, -1.0, 0.5, 3.0, -2.5], dtype=torch.float64)

Build = Callable[..., Searcher]
"""(dim=5, seed=0) -> a new searcher."""


@pytest.fixture(params=CASES, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))
def build(request: pytest.FixtureRequest) -> Build:
    name, settings = request.param

    def make(dim: int = DIM, seed: int = 0) -> Searcher:
        config = SearchConfig(name=name, population=12, **settings)
        searcher: Searcher = resolve_searcher(name)(config, SearchSpace.plain(dim), seed)
        return searcher

    return make


def quadratic(thetas: Tensor) -> Tensor:
    return -(thetas - OPTIMUM[: thetas.shape[1]]).square().sum(1)


def play(searcher: Searcher, rounds: int) -> None:
    for _ in range(rounds):
        thetas = searcher.ask()
        searcher.tell(thetas, quadratic(thetas))


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_shapes_and_types(build: Build, dim: int) -> None:
    searcher = build(dim)
    assert torch.equal(searcher.mean, torch.zeros(dim, dtype=torch.float64))
    for _ in range(3):
        thetas = searcher.ask()
        assert thetas.shape == (12, dim)
        assert thetas.dtype == torch.float64
        assert bool(thetas.isfinite().all())
        assert len(torch.unique(thetas, dim=0)) == 12
        assert not thetas.requires_grad
        searcher.tell(thetas, quadratic(thetas))
    assert searcher.mean.shape == (dim,)
    assert searcher.mean.dtype == torch.float64


def test_asking_is_repeatable(build: Build) -> None:
    searcher = build()
    for _ in range(3):
        thetas = searcher.ask()
        assert torch.equal(searcher.ask(), thetas)
        searcher.tell(thetas, quadratic(thetas))
        assert not torch.equal(searcher.ask(), thetas)


def test_what_is_asked_follows_from_seed_and_rewards(build: Build) -> None:
    a, b, other = build(seed=3), build(seed=3), build(seed=4)
    torch.manual_seed(1)
    for _ in range(3):
        b.ask()  # never counts
        torch.rand(5)  # the global generator plays no part
        assert torch.equal(a.ask(), b.ask())
        assert not torch.equal(a.ask(), other.ask())
        play(a, 1)
        play(b, 1)
        play(other, 1)
    assert torch.equal(a.mean, b.mean)
    assert not torch.equal(a.mean, other.mean)


@pytest.mark.parametrize("seed", range(3))
def test_a_quadratic_is_climbed(build: Build, seed: int) -> None:
    searcher = build(seed=seed)
    play(searcher, 50)
    # From |optimum| = 4.5; the same 600 evaluations at random would not come near.
    assert float((searcher.mean - OPTIMUM).norm()) < 0.15 * float(OPTIMUM.norm())


def test_inputs_are_not_altered(build: Build) -> None:
    searcher = build()
    thetas = searcher.ask()
    rewards = quadratic(thetas)
    rewards[3] = math.nan
    kept = thetas.clone(), rewards.clone()
    searcher.tell(thetas, rewards)
    assert torch.equal(thetas, kept[0])
    assert torch.equal(rewards.isnan(), kept[1].isnan())
    mean = searcher.mean
    mean.add_(100)
    assert float(searcher.mean.abs().max()) < 100


def test_failed_candidates_repel(build: Build) -> None:
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


def test_a_failure_equals_the_worst_reward(build: Build) -> None:
    a, b, c = build(), build(), build()
    thetas = a.ask()
    rewards = quadratic(thetas)
    worst = float(rewards.min())
    for searcher, value in ((a, math.nan), (b, worst), (c, -math.inf)):
        told = rewards.clone()
        told[rewards.argmax()] = value
        searcher.tell(thetas, told)
    assert torch.equal(a.mean, b.mean)
    assert torch.equal(a.mean, c.mean)


@pytest.mark.parametrize("rounds", [0, 2])
@pytest.mark.parametrize("value", [math.nan, 0.7])
def test_a_round_without_information_moves_nothing(build: Build, rounds: int, value: float) -> None:
    searcher = build()
    play(searcher, rounds)
    thetas, before = searcher.ask(), searcher.mean
    searcher.tell(thetas, torch.full((12,), value, dtype=torch.float64))
    assert torch.equal(searcher.mean, before)
    # Asking the same again would fail the same way for ever.
    assert not torch.equal(searcher.ask(), thetas)
    play(searcher, 1)
    assert not torch.equal(searcher.mean, before)


def disturb(searcher: Searcher, round_index: int) -> None:
    """One round of a life with everything in it: steps, failures, damping, a new centre."""
    thetas = searcher.ask()
    rewards = quadratic(thetas)
    if round_index == 1:
        rewards[2] = math.nan
        searcher.damp(0.7)
    if round_index == 2:
        rewards[:] = math.nan
    searcher.tell(thetas, rewards)
    if round_index == 3:
        searcher.recenter(0.5 * searcher.mean)


def through_files(state: dict[str, Any]) -> dict[str, Any]:
    """As a resume point does: copies of tensors, numbers as JSON text."""
    assert set(state) == {"tensors", "scalars"}
    assert all(isinstance(tensor, Tensor) for tensor in state["tensors"].values())
    scalars = json.loads(json.dumps(state["scalars"], allow_nan=False))
    return {"tensors": {k: v.clone() for k, v in state["tensors"].items()}, "scalars": scalars}


@pytest.mark.parametrize("stop", range(6))
def test_a_restored_searcher_goes_on_exactly(build: Build, stop: int) -> None:
    whole, first = build(seed=8), build(seed=8)
    for i in range(stop):
        disturb(whole, i)
        disturb(first, i)
    second = build(seed=8)
    disturb(second, 0)  # what it did before does not matter
    second.load_state_dict(through_files(first.state_dict()))
    for i in range(stop, 7):
        assert torch.equal(second.ask(), whole.ask())
        disturb(whole, i)
        disturb(second, i)
        assert torch.equal(second.mean, whole.mean)


def test_another_seed_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match="seed"):
        build(seed=1).load_state_dict(build(seed=2).state_dict())


def test_damped_steps_are_smaller(build: Build) -> None:
    plain, damped = build(), build()
    damped.damp(0.5)
    play(plain, 1)
    play(damped, 1)
    assert 0 < float(damped.mean.norm()) < float(plain.mean.norm())
    restored = build()
    restored.damp(0.5)
    restored.damp(4.0)  # caught up: back to the configured step, not beyond
    play(restored, 1)
    assert torch.equal(restored.mean, plain.mean)


def test_recentring(build: Build) -> None:
    searcher = build()
    play(searcher, 4)
    target = torch.tensor([0.1, -0.2, 0.3, 0.0, 5.0], dtype=torch.float64)
    searcher.recenter(target)
    torch.testing.assert_close(searcher.mean, target, rtol=0, atol=1e-12)
    # Proposals follow: twelve draws whose mean is within a few standard errors of the centre.
    assert float((searcher.ask().mean(0) - target).abs().max()) < 1.5
    play(searcher, 60)
    assert float((searcher.mean - OPTIMUM).norm()) < 0.5 * float((target - OPTIMUM).norm())


def test_nothing_to_search_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match="0 dimensions"):
        build(dim=0)
