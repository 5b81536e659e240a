"""Theta with coefficients, guidance and a guide's coefficients: ordered, differentiable."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from merge_rl.core.merging.linear_maps import FreeMap
from merge_rl.core.merging.live_model import theta_gradient
from merge_rl.core.merging.tuned_map import (
    END_UNIT,
    STRENGTH_UNIT,
    GuidanceCoordinates,
    Layout,
    Setup,
    TunedMap,
    anchored,
    before_and_after,
    merge_map,
    setup_of,
)
from merge_rl.errors import ConfigError

LEVELS = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0], dtype=torch.float64)  # four steps


def coordinates(*start: float, grid: Tensor = LEVELS) -> GuidanceCoordinates:
    return GuidanceCoordinates(torch.tensor(start, dtype=torch.float64), grid)


def free(groups: int, count: int) -> FreeMap:
    init = torch.arange(1.0, count + 1, dtype=torch.float64)
    return FreeMap(init=init, scale=0.5, num_groups=groups)


def test_zeros_are_the_start_and_units_are_what_they_say() -> None:
    at = coordinates(1.5, 1.5, 5.0)
    zeros = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(at(zeros), torch.tensor([1.5, 1.5, 5.0]).double())
    # One step of four is 1 / (4 END_UNIT) units. 5 is a quarter of the way from 4 to 8: a step
    # down the grid it is a quarter from 2 to 4. 1.5 is half-way from 1 to 2, then 0 to 1.
    step = 1 / (4 * END_UNIT)
    moved = at(torch.tensor([1 / STRENGTH_UNIT, -step, -step], dtype=torch.float64))
    torch.testing.assert_close(moved, torch.tensor([1.5 * math.e, 0.5, 2.5]).double())


def test_ends_beyond_the_grid_are_its_own_and_come_back_into_it() -> None:
    at = coordinates(1.0, 0.0, math.inf)
    zeros = torch.zeros(3, dtype=torch.float64)
    assert at(zeros).tolist() == [1.0, 0.0, 8.0]
    quarter = torch.tensor([0.0, 0.0, 0.25 / (4 * END_UNIT)], dtype=torch.float64)
    # A quarter of a step beyond 8 and before it are the same: three quarters from 4 to 8.
    torch.testing.assert_close(at(quarter), at(-quarter))
    torch.testing.assert_close(at(quarter), torch.tensor([1.0, 0.0, 7.0]).double())


def test_ends_are_ordered_wherever_theta_is() -> None:
    at = coordinates(1.2, 0.25, 0.75, grid=torch.linspace(0, 1, 6, dtype=torch.float64))
    for seed in range(20):
        theta = 8 * torch.randn(3, generator=torch.Generator().manual_seed(seed)).double()
        strength, low, high = at(theta).tolist()
        assert strength > 0
        assert 0 <= low <= high <= 1


@pytest.mark.parametrize("theta", [(0.0, 0.3, -0.2), (-1.0, 2.2, 0.4), (3.0, -7.0, 9.0)])
def test_the_derivative_is_that_of_small_differences(theta: tuple[float, ...]) -> None:
    at, point = coordinates(1.4, 0.7, 5.0), torch.tensor(theta, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(at, point)  # type: ignore[no-untyped-call]
    for i in range(3):
        small = torch.zeros(3, dtype=torch.float64)
        small[i] = 1e-6
        slope = (at(point + small) - at(point - small)) / 2e-6
        torch.testing.assert_close(jacobian[:, i], slope, rtol=1e-7, atol=1e-8)
    assert bool((jacobian.abs().sum(0) > 0).all())  # nothing is out of reach of a derivative


def test_at_the_ends_of_the_grid_there_is_a_derivative_too() -> None:
    zeros = torch.zeros(3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(coordinates(1.0, 0.0, 80.0), zeros)  # type: ignore[no-untyped-call]
    assert bool((jacobian.abs().sum(0) > 0).all())


def test_a_strength_of_0_cannot_be_moved_by_factors() -> None:
    with pytest.raises(ConfigError, match="expected a start above 0, got 0"):
        coordinates(0.0, 0.0, 1.0)


def test_rows_hold_what_was_joined() -> None:
    layout = Layout(2, 4, guidance=True, guide=(3, 5))
    setup = Setup(torch.randn(2, 4), torch.tensor([1.5, 0.1, 0.9]), torch.randn(3, 5))
    rows = layout.join(setup)
    assert rows.shape == (2 + 1 + 3, 5)
    for found, given in zip(layout.split(rows), setup, strict=True):
        assert torch.equal(found, given)  # type: ignore[arg-type]
    assert layout.split(setup.coefficients) == Setup(setup.coefficients)
    narrow = Layout(1, 2, guidance=True)
    assert torch.equal(narrow.split(narrow.join(Setup(torch.ones(1, 2), setup[1])))[1], setup[1])  # type: ignore[arg-type]


def test_parts_of_theta_go_to_their_maps() -> None:
    own, guide = free(2, 3), free(1, 2)
    whole = TunedMap(inner=own, guidance=coordinates(1.5, 0.0, 8.0), guide=guide)
    assert (whole.dim, whole.num_groups, whole.num_checkpoints) == (6 + 3 + 2, 2, 3)
    theta = torch.linspace(-1, 1, 11, dtype=torch.float64)
    found = setup_of(whole, whole(theta))
    assert torch.equal(found.coefficients, own(theta[:6]))
    assert torch.equal(found.guide, guide(theta[9:]))  # type: ignore[arg-type]
    rows = own(theta[:6])
    back = whole.theta_of(rows)
    torch.testing.assert_close(back, torch.cat([theta[:6], torch.zeros(5).double()]))
    # The gradient of rows is that of the parts, each by its own map.
    pull = torch.randn_like(whole(theta))
    assert torch.equal(theta_gradient(whole, theta, pull)[:6], 0.5 * pull[:2, :3].flatten())
    assert merge_map(whole) is own
    assert merge_map(own) is own


def test_guidance_alone_keeps_the_coefficients_of_the_start() -> None:
    own = free(1, 3)
    alone = TunedMap(inner=own, fixed=own(torch.zeros(3).double()), guidance=coordinates(1, 0, 8))
    start = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    moved = anchored(alone, start)
    assert moved.dim == 3
    assert moved.theta_of(start).tolist() == [0, 0, 0]
    found = setup_of(moved, moved(torch.ones(3).double()))
    assert torch.equal(found.coefficients, start)
    assert found.as_dict()["guidance"]["strength"] == pytest.approx(math.exp(STRENGTH_UNIT))
    assert anchored(own, start) is own


def test_a_map_of_coefficients_alone_gives_nothing_beside_them() -> None:
    assert before_and_after(free(1, 2), torch.ones(1, 2, dtype=torch.float64)) == {}
