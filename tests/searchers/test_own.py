"""A searcher of the user's: its failures are told by its name, its inputs stay as they were."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import merge_rl as mrl
from merge_rl import own_code, registry
from merge_rl.config import EvaluationConfig, OptimizeConfig, RewardConfig, SearchConfig
from merge_rl.errors import BudgetError, ConfigError
from merge_rl.searchers.base import SearchSpace
from merge_rl.searchers.own import OwnSearcher
from merge_rl.workflows.optimize.budget import plan_budget


class Pair(mrl.Searcher):
    """Two candidates a round."""

    def ask(self) -> Tensor:
        return torch.stack([self.mean, self.mean + 1])

    def tell(self, thetas: Tensor, rewards: Tensor) -> None:
        self.mean = thetas[rewards.argmax()].clone()
        thetas.zero_()
        rewards.zero_()


def failing(*_given: object) -> Any:
    raise RuntimeError("no more ideas")


def made(**changes: Any) -> OwnSearcher:
    kind = type("Pair", (Pair,), changes)
    space = SearchSpace.plain(3)
    return OwnSearcher(kind(SearchConfig(), space, 0), "mine:Pair", 3)


@pytest.mark.parametrize("what", ["ask", "tell", "recenter", "state_dict", "load_state_dict"])
def test_what_fails_is_told_by_name(what: str) -> None:
    searcher = made(**{what: failing})
    theta = torch.zeros(3).double()
    state: dict[str, Any] = {"tensors": {}, "scalars": {}}
    given: dict[str, Any] = {
        "tell": (theta.expand(2, 3), theta[:2]), "recenter": (theta,), "load_state_dict": (state,),
    }  # fmt: skip
    said = f"searcher 'mine:Pair': its {what} failed: RuntimeError: no more ideas"
    with pytest.raises(ConfigError, match=re.escape(said)):
        getattr(searcher, what)(*given.get(what, ()))


def test_a_searcher_may_write_into_what_it_is_told() -> None:
    searcher, rewards = made(), torch.tensor([1.0, 2.0])
    thetas = searcher.ask()
    searcher.tell(thetas, rewards)
    assert thetas.tolist() == [[0.0] * 3, [1.0] * 3]
    assert rewards.tolist() == [1.0, 2.0]
    assert searcher.mean.tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"ask": lambda _s: torch.zeros(2, 3).numpy()}, "got ndarray"),
        ({"ask": lambda _s: torch.zeros(3)}, "ask() a tensor (P, 3), got (3,) of float32"),
        ({"ask": lambda _s: torch.zeros(2, 3) + 1j}, "(P, 3), got (2, 3) of complex64"),
        ({"state_dict": lambda _s: {"method": failing}}, "by name, got function at 'method'"),
        ({"state_dict": lambda _s: [1]}, "by name, got list"),
    ],
)
def test_what_is_none_is_refused(changes: dict[str, Any], found: str) -> None:
    searcher = made(**changes)
    with pytest.raises(ConfigError, match=re.escape(found)):
        getattr(searcher, next(iter(changes)))()


def test_a_budget_is_held_to_what_the_searcher_will_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_code, "_allowed", {})
    name = own_code.allow(Pair)
    assert not registry.knows_population(SearchConfig(name=name))
    search, evaluation = SearchConfig(name=name), EvaluationConfig(num_images=10)
    reward = RewardConfig(pool_size=100, subset_size=50, num_subsets=1)
    config = OptimizeConfig(budget=500, search=search, reward=reward, evaluation=evaluation)
    plan_budget(config)  # how many candidates that are the searcher will say
    asked = dataclasses.replace(config, search=dataclasses.replace(search, population=16))
    with pytest.raises(BudgetError, match="for one round: 16 candidates"):
        plan_budget(asked)
