"""Greedy soup on rewards made up by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from merge_rl.config.optimize import SearchConfig
from merge_rl.core.merging.linear_maps import FreeMap
from merge_rl.searchers.base import SearchSpace
from merge_rl.searchers.baselines import GreedySoup, soup_plan

NAN = math.nan


def build(evaluations: int = 1, names: str = "abcd") -> GreedySoup:
    init = torch.zeros(len(names), dtype=torch.float64)
    space = SearchSpace(
        map=FreeMap(init=init, scale=1.0), names=tuple(names), evaluations=evaluations
    )
    return GreedySoup(SearchConfig(name="greedy-soup"), space, 0)


def members(theta: Tensor) -> str:
    """The letters of the checkpoints in an average; their shares must be equal."""
    inside = theta.nonzero().flatten().tolist()
    torch.testing.assert_close(theta[inside], torch.full((len(inside),), 1 / len(inside)).double())
    return "".join("abcd"[i] for i in inside)


def play(searcher: GreedySoup, values: Mapping[str, float]) -> list[list[str]]:
    """What was asked, round by round, with a table of rewards."""
    asked = []
    while not searcher.done:
        thetas = searcher.ask()
        asked.append([members(theta) for theta in thetas])
        rewards = [values[name] for name in asked[-1]]
        searcher.tell(thetas, torch.tensor(rewards, dtype=torch.float64))
    return asked


@pytest.mark.parametrize(
    ("checkpoints", "evaluations", "plan"),
    [
        (4, 1, (1, 1)),
        # 30 of 90 rank, 7 rounds of 4; the other 62 are 10 rounds of 2 for each of 3 additions.
        (4, 90, (7, 10)),
        (2, 12, (2, 4)),
        (1, 10, (3, 3)),
    ],
)
def test_soup_plan(checkpoints: int, evaluations: int, plan: tuple[int, int]) -> None:
    assert soup_plan(checkpoints, evaluations) == plan


def test_a_soup_by_hand() -> None:
    values = {"a": 1.0, "b": 4.0, "c": 3.0, "d": 2.0, "bc": 3.5, "bd": 5.0, "abd": 5.0}
    searcher = build()
    # c makes b worse and is left out, d makes it better; a changes nothing: not better, so out.
    assert play(searcher, values) == [
        ["a", "b", "c", "d"], ["b", "bc"], ["b", "bd"], ["bd", "abd"],
    ]  # fmt: skip
    assert members(searcher.mean) == "bd"
    assert {name: members(theta) for name, theta in searcher.finalists.items()} == {
        "mean": "bd", "b": "b",
    }  # fmt: skip


def test_comparisons_are_sums_over_paired_rounds() -> None:
    searcher = build(evaluations=12, names="ab")  # 2 rounds of both, then 4 of the pair
    for rewards in ((1.0, 3.0), (1.0, -2.0)):  # sums 2 and 1: a leads
        searcher.tell(searcher.ask(), torch.tensor(rewards).double())
    assert members(searcher.mean) == "a"
    for rewards in ((0.0, 1.0), (5.0, 1.0), (0.0, 1.0), (0.0, 3.0)):  # 5 against 6
        assert [members(theta) for theta in searcher.ask()] == ["a", "ab"]
        assert members(searcher.mean) == "a"
        searcher.tell(searcher.ask(), torch.tensor(rewards).double())
    assert searcher.done
    assert members(searcher.mean) == "ab"


def test_failures() -> None:
    # c fails alone and is never added; b fails with a, and a goes on without it.
    values = {"a": 3.0, "b": 2.0, "c": NAN, "d": 1.0, "ab": NAN, "ad": 4.0}
    searcher = build()
    assert play(searcher, values) == [["a", "b", "c", "d"], ["a", "ab"], ["a", "ad"]]
    assert members(searcher.mean) == "ad"
    # A soup that fails where the larger one does not gives way to it.
    searcher = build(names="ab")
    searcher.tell(searcher.ask(), torch.tensor([2.0, 1.0]).double())
    searcher.tell(searcher.ask(), torch.tensor([NAN, -9.0]).double())
    assert members(searcher.mean) == "ab"
    # Nothing can be said while everything fails.
    searcher = build(names="ab")
    for _ in range(3):
        searcher.tell(searcher.ask(), torch.tensor([NAN, NAN]).double())
        assert not searcher.done
        assert searcher.mean.tolist() == [0.0, 0.0]
    searcher.tell(searcher.ask(), torch.tensor([1.0, 2.0]).double())
    assert members(searcher.mean) == "b"


def test_a_mean_that_fails_loses_what_was_added_last() -> None:
    searcher = build()
    searcher.tell(searcher.ask(), torch.tensor([4.0, 3.0, 2.0, 1.0]).double())
    searcher.tell(searcher.ask(), torch.tensor([0.0, 1.0]).double())
    assert members(searcher.mean) == "ab"
    searcher.recenter(torch.zeros(4))
    assert [members(theta) for theta in searcher.ask()] == ["a", "ac"]
    searcher.recenter(torch.zeros(4))  # a alone fails, too: c takes its place
    assert [members(theta) for theta in searcher.ask()] == ["c", "cd"]
    searcher.tell(searcher.ask(), torch.tensor([2.0, 1.0]).double())
    assert members(searcher.mean) == "c"
