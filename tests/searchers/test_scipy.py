"""SciPy's minimisers turned around: the same points, in the same order, and the same end."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from merge_rl.config.optimize import SearchConfig
from merge_rl.errors import RunError
from merge_rl.searchers.base import SearchSpace
from merge_rl.searchers.scipy_search import Scipy

OPTIMUM = torch.tensor([0.6, -1.1], dtype=torch.float64)


def build(method: str, dim: int = 2, seed: int = 0, **settings: Any) -> Scipy:
    config = SearchConfig(name=f"scipy:{method}", **settings)
    return Scipy(config, SearchSpace.plain(dim), seed)


def bowl(thetas: Tensor) -> Tensor:
    gap = thetas - OPTIMUM[: thetas.shape[1]]
    return -(gap.square() * torch.tensor([1.0, 4.0])[: thetas.shape[1]]).sum(1)


def play(searcher: Scipy, evaluations: int = 400) -> Tensor:
    asked: list[Tensor] = []
    while not searcher.done and sum(map(len, asked)) < evaluations:
        asked.append(searcher.ask())
        searcher.tell(asked[-1], bowl(asked[-1]))
    return torch.cat(asked)


@pytest.mark.parametrize("method", ["nelder-mead", "powell", "COBYLA"])
def test_serial_methods_come_to_their_end(method: str) -> None:
    searcher = build(method)
    asked = play(searcher)
    assert searcher.done
    assert asked[0].tolist() == [0.0, 0.0]
    assert 10 < len(asked) < 300
    torch.testing.assert_close(searcher.mean, OPTIMUM, rtol=0, atol=3e-3)
    with pytest.raises(RunError, match="is done"):
        searcher.ask()


def test_what_is_asked_is_what_scipy_asks() -> None:
    called: list[npt.NDArray[np.float64]] = []

    def objective(theta: npt.NDArray[np.float64]) -> float:
        called.append(theta.copy())
        return -float(bowl(torch.from_numpy(theta)[None])[0])

    # The first simplex: steps of std along the axes.
    simplex = np.array([[0.0, 0.0], [0.5, 0.0], [0.0, 0.5]])
    minimize(
        objective, np.zeros(2), method="Nelder-Mead",
        options={"initial_simplex": simplex, "xatol": 5e-4, "fatol": np.inf},
    )  # fmt: skip
    asked = play(build("Nelder-Mead", std=0.5))
    np.testing.assert_array_equal(asked.numpy(), np.stack(called))
    np.testing.assert_array_equal(asked[:3].numpy(), simplex)


@pytest.mark.parametrize("method", ["nelder-mead", "powell", "cobyla", "differential-evolution"])
@pytest.mark.parametrize("stop", [0, 1, 9])
def test_a_restored_search_goes_on(method: str, stop: int) -> None:
    whole, first = build(method), build(method)
    for _ in range(stop):
        for searcher in (whole, first):
            searcher.tell(searcher.ask(), bowl(searcher.ask()))
    second = build(method)
    second.load_state_dict(first.state_dict())
    for _ in range(5):
        assert torch.equal(second.ask(), whole.ask())
        for searcher in (whole, second):
            searcher.tell(searcher.ask(), bowl(searcher.ask()))
    assert torch.equal(second.mean, whole.mean)


def test_another_log_is_refused() -> None:
    searcher = build("nelder-mead")
    play(searcher, 9)
    state = searcher.state_dict()
    state["tensors"]["log.thetas"][4, 0] += 1e-12
    restored = build("nelder-mead")
    restored.load_state_dict(state)
    with pytest.raises(RunError, match=r"scipy:nelder-mead asks in round \d what it had not asked"):
        restored.ask()


def test_failures_turn_a_serial_search_away() -> None:
    searcher = build("nelder-mead")
    while not searcher.done:
        thetas = searcher.ask()
        searcher.tell(thetas, torch.where(thetas[:, 0] > 0.3, math.nan, bowl(thetas)))
    assert 0 < float(searcher.mean[0]) <= 0.3
    assert float(searcher.mean[1]) == pytest.approx(-1.1, abs=0.1)


def test_halving_begins_again_at_the_best_with_half_the_steps() -> None:
    searcher = build("nelder-mead", std=0.5)
    play(searcher, 12)
    best = searcher.mean
    searcher.halve()
    assert torch.equal(searcher.mean, best)
    asked = play(searcher, 3)
    offsets = torch.tensor([[0.0, 0.0], [0.25, 0.0], [0.0, 0.25]], dtype=torch.float64)
    torch.testing.assert_close(asked, best + offsets)


@pytest.mark.parametrize("box", [0.5, 5.0])
def test_evolution_stays_in_its_box(box: float) -> None:
    searcher = build("differential-evolution", box=box, population=9)
    centre = torch.tensor([3.0, -2.0], dtype=torch.float64)
    searcher.recenter(centre)
    asked = play(searcher, 90)
    assert len(asked) == 90
    torch.testing.assert_close(asked[0], centre)
    reach = (asked - centre).abs().amax(0)
    assert float(reach.max()) <= box * (1 + 1e-12)
    assert float(reach.min()) > 0.7 * box  # of the first nine, uniform in the box
    assert not searcher.done


def test_a_flat_reward_is_no_end_of_an_evolution() -> None:
    searcher = build("differential-evolution", population=6)
    for _ in range(5):
        assert not searcher.done
        searcher.tell(searcher.ask(), torch.full((6,), 3.0).double())
