"""What searchers share: failures below all else, rounds that were asked, playing a log again."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_rl.config.optimize import SearchConfig
from merge_rl.errors import ConfigError, RunError
from merge_rl.searchers.base import SearchSpace, below_all
from merge_rl.searchers.replayed import Replayed

NAN = math.nan


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("rewards", "seen", "expected"),
    [
        ((3.0, NAN, 1.0), (), (3.0, -1.0, 1.0)),  # 1 - (3 - 1)
        ((3.0, NAN), (-5.0, 4.0), (3.0, -14.0)),  # -5 - (4 + 5)
        ((NAN, NAN), (2.0, 4.0), (0.0, 0.0)),
        ((NAN, 7.0), (), (7.0 - 7e-6, 7.0)),  # no spread: a step of a millionth
        ((NAN, 0.0), (), (-1e-6, 0.0)),
        ((NAN,), (), (-1e30,)),
        ((2.0, 1.0), (9.0,), (2.0, 1.0)),
    ],
)
def test_failures_are_below_all(
    rewards: tuple[float, ...], seen: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    found = below_all(vector(*rewards), vector(*seen))
    torch.testing.assert_close(found, vector(*expected), rtol=1e-12, atol=0)


class Counter(Replayed):
    """Asks (n, era) and (-n, era) in round n; recommends the last theta with the best reward."""

    step = 1.0

    def __init__(self, seed: int = 0, **settings: Any) -> None:
        config = SearchConfig(name="counter", **settings)
        super().__init__(config, SearchSpace.plain(2), seed)
        self._begin()

    def _begin(self) -> None:
        self.fed: list[Tensor] = []

    def _propose(self) -> Tensor:
        n = self.step * len(self.fed)
        self.last = self.centre + vector(n, self.era, -n, self.era).reshape(2, 2)
        return self.last

    def _feed(self, rewards: Tensor) -> None:
        self.fed.append(rewards)

    def _recommend(self) -> Tensor:
        return self.last[int(self.fed[-1].argmax())]


def told(searcher: Counter, *rounds: tuple[float, float]) -> Counter:
    for rewards in rounds:
        searcher.tell(searcher.ask(), vector(*rewards))
    return searcher


def test_what_was_not_asked_is_refused() -> None:
    searcher = told(Counter(), (1.0, 2.0))
    thetas = searcher.ask()
    with pytest.raises(
        ConfigError, match=r"rewards of the 2 thetas that counter asked, got \(2,\)"
    ):
        searcher.tell(thetas + 1e-9, vector(1.0, 2.0))
    with pytest.raises(ConfigError, match=r"got \(3,\) of \(2, 2\)"):
        searcher.tell(thetas, vector(1.0, 2.0, 3.0))
    assert searcher.rounds == 1
    assert torch.equal(searcher.ask(), thetas)


def test_a_log_is_fed_again_as_it_was_told() -> None:
    searcher = told(Counter(), (1.0, 5.0), (NAN, 2.0), (NAN, NAN), (3.0, 4.0))
    assert searcher.mean.tolist() == [-3.0, 0.0]
    # The failure: below 1, the worst so far, by the spread of 1 to 5.
    assert [rewards.tolist() for rewards in searcher.fed[:2]] == [[1.0, 5.0], [-3.0, 2.0]]
    assert bool(searcher.fed[2].isnan().all())
    restored = Counter()
    restored.load_state_dict(searcher.state_dict())
    for a, b in zip(restored.fed, searcher.fed, strict=True):
        assert torch.equal(a.nan_to_num(nan=99), b.nan_to_num(nan=99))
    assert torch.equal(restored.mean, searcher.mean)
    assert torch.equal(restored.ask(), searcher.ask())


def test_a_library_that_asks_otherwise_is_refused() -> None:
    state = told(Counter(), (1.0, 2.0), (1.0, 2.0)).state_dict()
    other = Counter()
    other.step = 2.0
    with pytest.raises(RunError, match=r"cannot go on: counter asks in round 1 what it had not"):
        other.load_state_dict(state)


def test_eras() -> None:
    searcher = told(Counter(std=2.0), (1.0, 5.0), (1.0, 5.0))
    searcher.halve()  # from the mean (-1, 0), half as wide
    assert (searcher.era, searcher.spread, searcher.spent, searcher.num_logged) == (1, 1.0, 4, 0)
    assert searcher.ask().tolist() == [[-1.0, 1.0], [-1.0, 1.0]]
    told(searcher, (2.0, 3.0))
    searcher.recenter(vector(10.0, 20.0))
    assert searcher.mean.tolist() == [10.0, 20.0]
    assert (searcher.era, searcher.spread, searcher.spent) == (2, 1.0, 6)
    assert searcher.ask().tolist() == [[10.0, 22.0], [10.0, 22.0]]
    told(searcher, (NAN, 6.0))  # below the worst of all eras, 1, by the spread of 1 to 6
    assert searcher.fed[-1].tolist() == [-4.0, 6.0]
    restored = Counter(std=2.0)
    restored.load_state_dict(searcher.state_dict())
    assert torch.equal(restored.ask(), searcher.ask())
    assert (restored.era, restored.spread, restored.spent) == (2, 1.0, 6)


def test_a_new_start_is_no_new_era() -> None:
    searcher = Counter()
    searcher.recenter(vector(7.0, 8.0))
    assert searcher.era == 0
    assert searcher.ask().tolist() == [[7.0, 8.0], [7.0, 8.0]]
