"""Successive halving: who is looked at how often."""

from __future__ import annotations

import itertools

import pytest

from merge_rl.workflows.optimize.budget import cost, most_entries, tournament_rounds


def test_by_hand() -> None:
    # 7, 4, 2: three rungs of 2,100 // 3 = 700 images.
    assert tournament_rounds(7, 2100) == ((7, 100), (4, 175), (2, 350))
    assert tournament_rounds(2, 10) == ((2, 5),)
    assert tournament_rounds(3, 13) == ((3, 2), (2, 3))


def test_nothing_to_choose_and_nothing_to_pay_with() -> None:
    assert tournament_rounds(1, 1000) == ()
    assert tournament_rounds(0, 1000) == ()
    assert tournament_rounds(7, 2099, 100) == ()
    assert tournament_rounds(4, 3) == ()


@pytest.mark.parametrize("entries", range(2, 20))
@pytest.mark.parametrize("images", [100, 1234, 9000])
def test_the_budget_holds_and_one_is_left(entries: int, images: int) -> None:
    rungs = tournament_rounds(entries, images)
    if not rungs:
        return
    assert cost(rungs) <= images
    assert rungs[0].entries == entries
    assert rungs[-1].entries == 2
    for a, b in itertools.pairwise(rungs):
        assert b.entries == -(-a.entries // 2)
        assert b.images >= a.images


def test_most_entries() -> None:
    # 5 entries take 3 rungs of 5 * 100 images, 4 take 2 of 4 * 100, 6 would take 3 of 600.
    assert most_entries(1600, 100) == 5
    assert most_entries(1499, 100) == 4
    assert most_entries(200, 100) == 2
    assert most_entries(199, 100) == most_entries(0, 1) == 1
