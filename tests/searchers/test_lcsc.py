"""Evolution over coefficients: the operators, the archive, the finals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_rl.config.optimize import SearchConfig
from merge_rl.core.merging.ema_profiles import Profiles
from merge_rl.core.merging.linear_maps import AffineMap, FreeMap, WhitenedMap
from merge_rl.core.merging.maps import BoundedMap, CoefficientMap, EmaMap, SoftmaxMap
from merge_rl.errors import ConfigError
from merge_rl.rng import stream
from merge_rl.searchers.base import SearchSpace
from merge_rl.searchers.lcsc import LCSC, crossover, mutate, rescale

K = 6
NEWEST = torch.eye(K, dtype=torch.float64)[-1]
GOAL = torch.tensor([-0.2, 0.0, 0.1, 0.2, 0.3, 0.6], dtype=torch.float64)


def build(
    kind: CoefficientMap | None = None, evaluations: int = 400, seed: int = 0, **settings: Any
) -> LCSC:
    made = kind or AffineMap(init=NEWEST, scale=0.05, base=K - 1)
    space = SearchSpace(map=made, names=tuple("abcdef"), evaluations=evaluations)
    return LCSC(SearchConfig(name="lcsc", **settings), space, seed)


def rows_of(searcher: LCSC, thetas: Tensor) -> Tensor:
    return torch.stack([searcher.space.coefficients(theta) for theta in thetas])


def play(searcher: LCSC, rounds: int) -> None:
    for _ in range(rounds):
        if not searcher.done:
            thetas = searcher.ask()
            searcher.tell(thetas, -(rows_of(searcher, thetas) - GOAL).square().sum((1, 2)))


def test_crossover_takes_each_coefficient_from_either_parent() -> None:
    first, second = torch.zeros(1, 4000), torch.ones(1, 4000)
    child = crossover(first, second, stream(0, "test"))
    assert set(child.flatten().tolist()) == {0.0, 1.0}
    # Half of them, within five standard errors of 4,000 coins.
    assert float(child.mean()) == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(4000))


def test_mutation_is_sparse_and_gaussian() -> None:
    row = torch.arange(20000, dtype=torch.float64)[None]
    moved = mutate(row, 0.1, 2000, stream(0, "test")) - row
    changed = moved[moved != 0]
    assert len(changed) == pytest.approx(2000, abs=5 * math.sqrt(2000 * 0.9))
    assert float(changed.std()) == pytest.approx(0.1, rel=5 / math.sqrt(2 * 2000))
    assert float(changed.mean()) == pytest.approx(0, abs=5 * 0.1 / math.sqrt(2000))
    for i in range(30):  # never a copy
        assert int((mutate(row[:, :9], 0.1, 0.0, stream(i, "test")) != row[:, :9]).sum()) == 1


def test_rescaling_leaves_small_sums_alone() -> None:
    rows = torch.tensor([[1.0, 3.0], [-0.5, 1.0], [0.04, 0.05], [-1.0, 0.5]])
    expected = torch.tensor([[0.25, 0.75], [-1.0, 2.0], [0.04, 0.05], [-1.0, 0.5]])
    torch.testing.assert_close(rescale(rows), expected)


def test_founders() -> None:
    searcher = build()
    rows = rows_of(searcher, searcher.ask())
    assert rows.shape == (16, 1, K)
    torch.testing.assert_close(rows[0, 0], NEWEST)
    torch.testing.assert_close(rows[1, 0], torch.full((K,), 1 / K).double())
    torch.testing.assert_close(rows.sum(2), torch.ones(16, 1).double())
    # 14 rows around the start: a standard deviation of 0.05, less the share of the fixed sum.
    spread = (rows[2:, 0] - NEWEST).square().mean().sqrt()
    assert float(spread) == pytest.approx(0.05 * math.sqrt(5 / 6), rel=0.2)


def test_children_come_from_the_best() -> None:
    # Mutation too small to see: a child is a parent, a mixture of two, or one of these scaled.
    searcher = build(FreeMap(init=NEWEST, scale=1.0), std=1.0)
    rows = rows_of(searcher, searcher.ask())
    rewards = -torch.arange(16, dtype=torch.float64)
    searcher.tell(searcher.ask(), rewards)
    searcher.spread = 1e-9
    children = rows_of(searcher, searcher.ask())
    torch.testing.assert_close(children[0], rows[0])
    plain = 0
    for child in children[1:, 0]:
        parents = (rows[:, 0] - child).abs() < 1e-7  # (16, K)
        if bool(parents.any(0).all()):
            plain += 1
            assert bool(parents[:8].any(0).all())  # of the eight best
        else:
            assert float(child.sum()) == pytest.approx(1)
    assert plain >= 5


def test_the_leader_is_judged_by_all_its_tries() -> None:
    searcher = build(population=4)
    first = searcher.ask()
    searcher.tell(first, torch.tensor([1.0, 9.0, 5.0, 0.0]).double())
    torch.testing.assert_close(searcher.mean, first[1])
    second = searcher.ask()
    torch.testing.assert_close(second[0], first[1])
    # 9 and -1 are 4 on average, less than the single 5.
    searcher.tell(second, torch.tensor([-1.0, 0.0, 0.0, 0.0]).double())
    torch.testing.assert_close(searcher.mean, first[2])
    assert list(searcher.finalists) == ["mean", "archive-2", "archive-3", "archive-4"]
    torch.testing.assert_close(searcher.finalists["archive-2"], first[1])
    # A leader that fails is out for good.
    searcher.tell(searcher.ask(), torch.tensor([math.nan, 0.0, 0.0, 0.0]).double())
    torch.testing.assert_close(searcher.mean, first[1])


def test_the_finals() -> None:
    # 80 evaluations, a fifth kept for the finals: four finalists, in rungs of 4 and 2.
    searcher = build(evaluations=80, population=8)
    play(searcher, 8)
    assert len(searcher.ask()) == 4
    before = searcher.finalists.values()
    thetas = searcher.ask()
    assert all(bool((thetas == theta).all(1).any()) for theta in before)
    asked = []
    while not searcher.done:
        thetas = searcher.ask()
        asked.append(len(thetas))
        # The order of the search is turned around: what counts is the finals alone.
        rewards = (rows_of(searcher, thetas) - GOAL).square().sum((1, 2))
        worst = thetas[rewards.argmax()]
        searcher.tell(thetas, rewards)
    assert asked == [4, 4, 2, 2, 2, 2]
    assert torch.equal(searcher.mean, worst)


@pytest.mark.parametrize(
    "kind",
    [
        AffineMap(init=NEWEST, scale=0.05, base=K - 1),
        FreeMap(init=NEWEST, scale=0.05),
        AffineMap(init=NEWEST, scale=0.05, base=K - 1, num_groups=2),
        WhitenedMap(init=NEWEST, scale=0.05, gram=torch.eye(K, dtype=torch.float64)[None]),
        BoundedMap(AffineMap(init=NEWEST, scale=0.05, base=K - 1), 1.0),
    ],
    ids=["affine", "free", "groups", "whitened", "bounded"],
)
def test_it_finds_coefficients(kind: CoefficientMap) -> None:
    searcher = build(kind, evaluations=600)
    play(searcher, 100)
    assert searcher.done
    found = searcher.space.coefficients(searcher.mean)
    start = float((searcher.start - GOAL).norm())
    assert float((found - GOAL).norm()) < 0.25 * start
    torch.testing.assert_close(found[0].sum(), found[0].sum().new_tensor(1.0), atol=0.2, rtol=0)


@pytest.mark.parametrize(
    "kind",
    [
        SoftmaxMap(init=torch.full((K,), 1 / K), scale=1.0),
        EmaMap(
            profiles=Profiles.of_widths(torch.arange(1, 7), torch.full((K,), 0.1)),
            base=K - 1,
            scale=0.1,
        ),
    ],
    ids=["softmax", "ema"],
)
def test_maps_that_cannot_hold_coefficients_of_either_sign(kind: CoefficientMap) -> None:
    message = f"lcsc searches coefficients of either sign, which the map {kind.kind} does not reach"
    with pytest.raises(ConfigError, match=message):
        build(kind)


def test_the_box_of_a_map_is_kept() -> None:
    box = BoundedMap(AffineMap(init=torch.full((K,), 1 / K), scale=0.5, base=0), 0.3)
    searcher = build(box, evaluations=200)
    for _ in range(6):
        thetas = searcher.ask()
        rows = rows_of(searcher, thetas)
        assert float(rows.abs().max()) <= 0.3 + 1e-9
        torch.testing.assert_close(rows.sum(2), torch.ones(len(rows), 1).double())
        # The goal has a coefficient of 0.6: the search leans on the wall.
        searcher.tell(thetas, -(rows - GOAL).square().sum((1, 2)))
    assert float(box(searcher.mean).abs().max()) > 0.28


def test_the_unit_is_that_of_the_median_direction() -> None:
    free = FreeMap(init=NEWEST, scale=0.25)
    assert build(free, std=2.0).spread == 0.5
    # Three checkpoints at distances 1, 1 and 10 from the origin, at right angles.
    gram = torch.diag(torch.tensor([1.0, 1.0, 100.0]).double())[None]
    whitened = WhitenedMap(init=torch.tensor([0.0, 0.0, 1.0]), scale=0.01, gram=gram)
    space = SearchSpace(map=whitened, names=("a", "b", "c"))
    spread = LCSC(SearchConfig(name="lcsc"), space, 0).spread
    moves = sorted(float(column.abs().max()) for column in whitened.bases[0].T)
    assert spread == pytest.approx(moves[0])  # of two, torch takes the lower
