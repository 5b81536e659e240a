"""nevergrad's optimisers: start, width, draws of their own, failures, what cannot work."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import pytest
import scipy
import torch
from torch import Tensor

from merge_rl.config.optimize import SearchConfig
from merge_rl.errors import ConfigError, RunError
from merge_rl.searchers.base import SearchSpace
from merge_rl.searchers.nevergrad_search import Nevergrad

OPTIMUM = torch.tensor([2.0, -1.0, 0.5, 1.5], dtype=torch.float64)
PARALLEL = ["CMA", "TBPSA", "TwoPointsDE", "OnePlusOne", "NGOpt", "PSO", "DiagonalCMA"]
REENTRANT = pytest.mark.skipif(
    tuple(map(int, scipy.__version__.split(".")[:2])) < (1, 16), reason="refused with this SciPy"
)
COBYLA = pytest.param("Cobyla", marks=REENTRANT)
DRAWN = ["RandomSearch", "StupidRandom"]  # the latter draws what it recommends


def build(name: str, dim: int = 4, seed: int = 0, evaluations: int = 160, **kw: Any) -> Nevergrad:
    config = SearchConfig(name=f"nevergrad:{name}", **kw)
    return Nevergrad(config, SearchSpace.plain(dim, evaluations), seed)


def quadratic(thetas: Tensor) -> Tensor:
    return -(thetas - OPTIMUM[: thetas.shape[1]]).square().sum(1)


def play(searcher: Nevergrad, rounds: int) -> list[Tensor]:
    asked = []
    for round_index in range(rounds):
        asked.append(searcher.ask())
        rewards = quadratic(asked[-1])
        if round_index == 2:
            rewards[0] = math.nan
        searcher.tell(asked[-1], rewards)
    return asked


@pytest.mark.parametrize("name", PARALLEL)
def test_any_name_searches_and_resumes(name: str) -> None:
    whole = build(name, population=8)
    assert whole.mean.tolist() == [0.0] * 4
    asked = play(whole, 6)
    assert all(len(thetas) == 8 for thetas in asked)
    assert float((whole.mean - OPTIMUM).norm()) < 0.8 * float(OPTIMUM.norm())
    # Another one, beside which the global generator is used, asks bit for bit the same.
    again = build(name, population=8)
    np.random.seed(5)  # noqa: NPY002
    for thetas in asked[:4]:
        assert torch.equal(again.ask(), thetas)
        np.random.rand(3)  # noqa: NPY002
        rewards = quadratic(thetas)
        if thetas is asked[2]:
            rewards[0] = math.nan
        again.tell(thetas, rewards)
    restored = build(name, population=8)
    restored.load_state_dict(again.state_dict())
    for thetas in asked[4:]:
        assert torch.equal(restored.ask(), thetas)
        restored.tell(thetas, quadratic(thetas))
    assert torch.equal(restored.mean, whole.mean)


@pytest.mark.parametrize("name", DRAWN)
def test_recommending_is_part_of_the_log(name: str) -> None:
    whole = build(name)
    play(whole, 3)
    restored = build(name)
    restored.load_state_dict(whole.state_dict())
    assert torch.equal(restored.ask(), whole.ask())


@pytest.mark.parametrize("name", ["OnePlusOne", COBYLA, "NelderMead", "SQP"])
def test_serial_optimisers(name: str) -> None:
    # Some of nevergrad's wait in a thread for their answer; a lost round is an answer, too.
    searcher = build(name, population=1)
    lost = build(name, population=1)
    lost.tell(lost.ask(), torch.tensor([math.nan]))
    assert lost.mean.tolist() == [0.0] * 4
    for _ in range(60):
        thetas = searcher.ask()
        assert thetas.shape == (1, 4)
        searcher.tell(thetas, quadratic(thetas))
        lost.tell(lost.ask(), quadratic(lost.ask()))
    assert float((searcher.mean - OPTIMUM).norm()) < 0.75 * float(OPTIMUM.norm())
    restored = build(name, population=1)
    restored.load_state_dict(searcher.state_dict())
    assert torch.equal(restored.ask(), searcher.ask())


def test_a_method_that_would_hang_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scipy, "__version__", "1.15.3")
    with pytest.raises(ConfigError, match=r"nevergrad:Cobyla needs scipy >= 1.16, found 1.15.3"):
        Nevergrad.population_of(SearchConfig(name="nevergrad:Cobyla"))


@REENTRANT
def test_threads_end_with_their_searcher() -> None:
    before = set(threading.enumerate())  # some of which, of earlier tests, may end meanwhile
    searcher = build("Cobyla")
    searcher.ask()
    (waiting,) = set(threading.enumerate()) - before
    del searcher
    waiting.join(timeout=20)
    assert not waiting.is_alive()


@pytest.mark.parametrize("name", ["CMA", "TBPSA", "TwoPointsDE"])
def test_first_draws_have_the_width_of_the_config(name: str) -> None:
    narrow, wide = (build(name, dim=20, population=30, std=std).ask() for std in (0.1, 2.0))
    torch.testing.assert_close(wide, 20 * narrow)
    # pycma's own first draws are a tenth shorter than a Gaussian's.
    assert 0.8 < float(wide.std()) / 2.0 < 1.2
    assert float(wide.mean()) == pytest.approx(0, abs=5 * 2.0 / math.sqrt(600))


def test_cma_also_offers_the_mean_of_its_distribution() -> None:
    searcher = build("CMA", std=0.5)
    assert list(searcher.finalists) == ["mean"]
    searcher.recenter(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    asked = play(searcher, 1)[0]
    found = searcher.finalists
    best = asked[quadratic(asked).argmax()]
    torch.testing.assert_close(found["mean"], best)
    # The mean of eight of the sixteen draws: none of them, and near their middle.
    assert not bool((asked == found["distribution"]).all(1).any())
    assert float((found["distribution"] - searcher.centre).norm()) < 1.0
    assert float((found["distribution"] - OPTIMUM).norm()) < float(
        (searcher.centre - OPTIMUM).norm()
    )


def test_a_design_drawn_up_at_once_ends() -> None:
    searcher, sizes = build("ScrHammersleySearch", evaluations=40), []
    while not searcher.done:
        thetas = searcher.ask()
        sizes.append(len(thetas))
        searcher.tell(thetas, quadratic(thetas))
    assert sizes == [16, 16, 8]
    with pytest.raises(RunError, match="nevergrad:ScrHammersleySearch is done"):
        searcher.ask()


def test_one_dimension_does_not_spoil_the_library() -> None:
    # nevergrad's CMA family writes into its own registry when it meets a single dimension.
    with pytest.raises(ConfigError, match=r"nevergrad:DiagonalCMA needs a package .*fcmaes"):
        play(build("DiagonalCMA", dim=1), 1)
    play(build("DiagonalCMA"), 1)


def test_what_fails_inside_the_library_is_a_sentence() -> None:
    # What it lacks depends on what else is installed.
    with pytest.raises(ConfigError, match=r"nevergrad:SMAC3 (.*another optimiser|needs a package)"):
        build("SMAC3").ask()


@pytest.mark.parametrize("rounds", [1, 3])
def test_another_seed_or_log_is_refused(rounds: int) -> None:
    searcher = build("CMA")
    play(searcher, rounds)
    state = searcher.state_dict()
    state["tensors"]["log.thetas"][-1, 0] += 1e-12
    with pytest.raises(RunError, match=f"nevergrad:CMA asks in round {rounds - 1} what it had no"):
        build("CMA").load_state_dict(state)
