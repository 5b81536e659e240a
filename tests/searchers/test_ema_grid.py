"""The grid of EMA profiles: which, from what, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from merge_rl.config.optimize import SearchConfig
from merge_rl.core.merging.ema_profiles import Profiles, exponent_from_std, posthoc_coefficients
from merge_rl.core.merging.linear_maps import FreeMap
from merge_rl.core.merging.maps import BoundedMap, SoftmaxMap
from merge_rl.errors import ConfigError
from merge_rl.searchers.base import SearchSpace
from merge_rl.searchers.baselines import WIDTHS, EmaGrid, grid_ends, profile_grid

NIMG = [1024, 1024, 2048, 2048, 4096, 4096, 8192, 8192]
STDS = [0.05, 0.10] * 4
PROFILES = Profiles.of_widths(NIMG, STDS)


def build(**changes: Any) -> EmaGrid:
    init = torch.zeros(8, dtype=torch.float64)
    init[-1] = 1
    settings: dict[str, Any] = {
        "map": FreeMap(init=init, scale=0.05), "names": tuple("abcdefgh"), "nimg": tuple(NIMG),
        "ema_std": tuple(STDS), "evaluations": 8 * 30,
    }  # fmt: skip
    space = SearchSpace(**{**settings, **changes})
    return EmaGrid(SearchConfig(name="ema-grid"), space, 0)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [80]), (2, [80, 50]), (3, [80, 60, 50]), (4, [80, 70, 60, 50]), (9, [80, 70, 60, 50])],
)
def test_ends_are_spread_over_the_later_half(count: int, expected: list[int]) -> None:
    # 3 of the places 0 to 3: 0, 1.5 and 3, and a half is rounded to the even 2.
    assert grid_ends([10, 20, 30, 40, 50, 60, 70, 80, 80], count) == expected[:count]


def test_candidates_are_posthoc_emas() -> None:
    searcher = build()
    assert len(searcher.labels) > 20
    for label, theta in zip(searcher.labels, searcher.thetas, strict=True):
        width, end = float(label.split()[1]), int(label.split()[-1])
        seen = [i for i in range(8) if NIMG[i] <= end]
        fitted = posthoc_coefficients(
            [NIMG[i] for i in seen], [STDS[i] for i in seen], [end], [width]
        )
        expected = torch.zeros(8, dtype=torch.float64)
        expected[seen] = fitted[:, 0]
        found = searcher.space.coefficients(theta)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert float(found.sum()) == pytest.approx(1)
    # What was saved is on the grid, as itself; later checkpoints have no part in earlier ends.
    assert PROFILES.row(4096, exponent_from_std(0.05)).tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    assert {"ema_std 0.05 at nimg 8192", "ema_std 0.1 at nimg 4096"} <= set(searcher.labels)


def test_the_budget_bounds_the_grid() -> None:
    # 15 widths, those of the checkpoints among them: one end of 15, or two.
    assert len({*WIDTHS, *STDS}) == 15
    few, more = profile_grid(PROFILES, limit=29), profile_grid(PROFILES, limit=30)
    assert {label.split()[-1] for label in few} == {"8192"}
    assert {label.split()[-1] for label in more} == {"8192", "4096"}
    assert profile_grid(PROFILES, limit=0).keys() == few.keys()
    assert len(few) <= 15
    # A width of another kind of run joins them.
    assert "ema_std 0.07 at nimg 8192" in profile_grid(
        Profiles.of_widths(NIMG, [0.05, 0.07] * 4), limit=1
    )


def test_repetitions_are_dropped() -> None:
    # One checkpoint before the end: whatever the width, the fit is that checkpoint.
    found = profile_grid(Profiles.of_widths([100, 200, 300], [0.1, 0.1, 0.1]), limit=1)
    rows = torch.stack(list(found.values()))
    gaps = (rows[:, None] - rows).abs().amax(2) + torch.eye(len(rows))
    assert float(gaps.min()) > 1e-6
    assert len(profile_grid(Profiles.of_widths([100], [0.1]), limit=100)) == 1


def test_fits_of_large_parts_are_skipped() -> None:
    # Widths that almost agree: their difference, blown up, would make the narrow profiles.
    almost = Profiles.of_widths([1000, 1000], [0.1, 0.1001])
    row = almost.row(1000, exponent_from_std(0.01))
    assert float(row.abs().sum()) > 100
    found = profile_grid(almost, limit=1)
    assert 2 <= len(found) < 10
    assert all(float(row.abs().sum()) <= 10 for row in found.values())


def test_the_grid_is_halved() -> None:
    searcher = build()
    goal = searcher.thetas[7]
    rounds = 0
    while not searcher.done:
        thetas = searcher.ask()
        searcher.tell(thetas, -(thetas - goal).square().sum(1))
        rounds += 1
    assert rounds >= 5
    assert torch.equal(searcher.mean, goal)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema_std": (None,) * 8}, "missing: ema_std of a, b, c, d, e and 3 more$"),
        ({"nimg": (None, *NIMG[1:])}, "every checkpoint in the manifest, missing: nimg of a$"),
        (
            {"nimg": (*NIMG[:7], None), "ema_std": (*STDS[:6], None, 0.1)},
            "missing: nimg of h; ema_std of g$",
        ),
        ({"nimg": (8192,) * 8}, "no EMA profile can be rebuilt .*: expected each input profile on"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**changes)


def test_a_map_without_negative_coefficients_is_refused() -> None:
    uniform = torch.full((8,), 1 / 8, dtype=torch.float64)
    with pytest.raises(ConfigError, match="ema-grid needs coefficients .* choose the map whitened"):
        build(map=SoftmaxMap(init=uniform, scale=1.0))


def test_profiles_beyond_the_bound_are_left_out() -> None:
    start = torch.full((8,), 1 / 8, dtype=torch.float64)
    box = BoundedMap(FreeMap(init=start, scale=1.0), 0.8)
    searcher, whole = build(map=box), build()
    assert 1 < len(searcher.labels) < len(whole.labels)
    rows = torch.stack([box(theta) for theta in searcher.thetas])
    assert float(rows.abs().max()) <= 0.8 + 1e-12
    with pytest.raises(ConfigError, match=r"within 0.13, got .*; choose a bound of at least 0\.\d"):
        build(map=BoundedMap(box.inner, 0.13))
