"""Runge-Kutta methods: order conditions, order of convergence, and where they may be evaluated."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from merge_rl.config.sampler import ADAPTIVE_SOLVERS, FIXED_SOLVERS
from merge_rl.core.sampling.edm import edm_noise_levels, edm_velocity, solve_edm
from merge_rl.core.sampling.paths import make_path, time_grid
from merge_rl.core.sampling.solvers import TABLEAUS, solve_adaptive, solve_fixed
from merge_rl.errors import ConfigError, UnknownNameError
from tests.gaussian import denoised, denoised_flow, path_flow, path_velocity

ORDER = {"euler": 1, "heun": 2, "midpoint": 2, "heun3": 3, "rk4": 4}
# One order more than promised: the leading error term of the midpoint method vanishes where the
# variance is quadratic in time, as on the linear path and for denoisers.
LUCKY = {("midpoint", "linear"): 3, ("midpoint", "edm"): 3}
X = torch.tensor([1.3, -0.4, 2.0], dtype=torch.float64)


def test_names_are_those_of_the_config() -> None:
    assert tuple(TABLEAUS) == FIXED_SOLVERS
    assert {name: tableau.order for name, tableau in TABLEAUS.items()} == ORDER


@pytest.mark.parametrize("solver", TABLEAUS)
def test_order_conditions(solver: str) -> None:
    # Butcher's conditions: b 1 = 1, b c = 1/2, b c^2 = 1/3, b A c = 1/6, and four of order 4.
    tableau = TABLEAUS[solver]
    count = tableau.stages
    a = torch.zeros(count, count, dtype=torch.float64)
    for i, row in enumerate(tableau.matrix):
        assert len(row) == i
        a[i, :i] = torch.tensor(row, dtype=torch.float64)
    b, c = (torch.tensor(v, dtype=torch.float64) for v in (tableau.weights, tableau.nodes))
    torch.testing.assert_close(a.sum(1), c)
    conditions = [
        (1, b.sum(), 1), (2, b @ c, 1 / 2), (3, b @ c**2, 1 / 3), (3, b @ a @ c, 1 / 6),
        (4, b @ c**3, 1 / 4), (4, (b * c) @ a @ c, 1 / 8), (4, b @ a @ c**2, 1 / 12),
        (4, b @ a @ a @ c, 1 / 24),
    ]  # fmt: skip
    for order, found, expected in conditions:
        if order <= tableau.order:
            assert float(found) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("path_name", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("solver", TABLEAUS)
def test_order_of_convergence_on_a_path(solver: str, path_name: str) -> None:
    path = make_path(path_name)
    errors = []
    for num_steps in (40, 80):
        times = time_grid(num_steps, end=path.end, dtype=torch.float64)
        found = solve_fixed(path_velocity(path), X, times, solver=solver)
        errors.append(float((found - path_flow(path, X, times[0], times[-1])).abs().max()))
    for coarse, fine in itertools.pairwise(errors):
        order = LUCKY.get((solver, path_name), ORDER[solver])
        assert coarse / fine == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("solver", TABLEAUS)
def test_order_of_convergence_for_denoisers(solver: str) -> None:
    # Down to a noise level above 0; the last step has tests of its own.
    errors = []
    for num_steps in (32, 64):
        sigmas = edm_noise_levels(num_steps, sigma_min=0.3, sigma_max=5.0, dtype=torch.float64)
        found = solve_fixed(edm_velocity(denoised), X * 5, sigmas[:-1], solver=solver)
        # The flow from the last level on is known, so that the end can be compared at sigma = 0.
        end = denoised_flow(found, float(sigmas[-2]))
        errors.append(float((end - denoised_flow(X * 5, 5.0)).abs().max()))
    for coarse, fine in itertools.pairwise(errors):
        order = LUCKY.get((solver, "edm"), ORDER[solver])
        assert coarse / fine == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("solver", TABLEAUS)
def test_denoisers_are_never_asked_at_sigma_zero(solver: str) -> None:
    asked: list[float] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append(float(sigma))
        return denoised(x, sigma)

    sigmas = edm_noise_levels(6, dtype=torch.float64)
    found = solve_edm(edm_velocity(denoise), X, sigmas, solver=solver)
    assert bool(found.isfinite().all())
    assert min(asked) > 0
    # heun and rk4 would need the slope at the end: one Euler call instead of theirs.
    stages = TABLEAUS[solver].stages
    last = 1 if solver in ("heun", "rk4") else stages
    assert len(asked) == 5 * stages + last


@pytest.mark.parametrize("solver", TABLEAUS)
def test_there_and_back(solver: str) -> None:
    path, times = make_path("linear"), time_grid(200, dtype=torch.float64)
    velocity = path_velocity(path)
    there = solve_fixed(velocity, X, times, solver=solver)
    back = solve_fixed(velocity, there, times.flip(0), solver=solver)
    tolerance = 0.05 if solver == "euler" else 1e-4
    assert float((back - X).abs().max()) < tolerance
    assert float((there - X).abs().max()) > 0.3


def test_steps_are_reported() -> None:
    heard: list[tuple[int, Tensor]] = []
    times = time_grid(3, dtype=torch.float64)
    found = solve_fixed(
        lambda x, t: torch.ones_like(x), X, times, on_step=lambda i, x: heard.append((i, x))
    )
    assert [i for i, _ in heard] == [0, 1, 2]
    for (_, x), t in zip(heard, times[1:], strict=True):
        torch.testing.assert_close(x, X + t)
    assert heard[-1][1] is found


def test_grids() -> None:
    torch.testing.assert_close(time_grid(4), torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    assert time_grid(2, end=0.96)[-1] == torch.tensor(0.96)
    for num_steps, end in ((0, 1.0), (-1, 1.0), (3, 0.0), (3, 1.1)):
        with pytest.raises(ConfigError, match="num_steps >= 1, got|end of the time grid in"):
            time_grid(num_steps, end=end)
    with pytest.raises(UnknownNameError, match="unknown solver 'huen'; did you mean 'heun'"):
        solve_fixed(lambda x, t: x, X, time_grid(2), solver="huen")


# ------------------------------------------------------------------------------------- adaptive


@pytest.mark.parametrize("rtol", [1e-3, 1e-6])
def test_adaptive_reaches_its_tolerance(rtol: float) -> None:
    path = make_path("linear")
    found = solve_adaptive(path_velocity(path), X, 0.0, 0.999, rtol=rtol, atol=rtol / 100)
    start, end = torch.tensor([0.0, 0.999], dtype=torch.float64)
    exact = path_flow(path, X, start, end)
    assert float((found - exact).abs().max()) < 10 * rtol


def test_adaptive_stops_where_it_is_told_to() -> None:
    asked: list[float] = []

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append(float(sigma))
        return edm_velocity(denoised)(x, sigma)

    found = solve_adaptive(velocity, X * 80, 80.0, 0.002, rtol=1e-6, atol=1e-8, overshoot=False)
    assert min(asked) == pytest.approx(0.002)
    exact = denoised_flow(X * 80, 80.0)
    torch.testing.assert_close(denoised_flow(found, 0.002), exact, rtol=1e-5, atol=1e-5)


def test_the_batch_moves_adaptive_results() -> None:
    # Why rewards refuse it: the same image alone and beside others, at the default tolerances.
    velocity = path_velocity(make_path("gvp"))
    alone = solve_adaptive(velocity, X[:1], 0.0, 1.0)
    together = solve_adaptive(velocity, torch.cat([X, X * 40]), 0.0, 1.0)[:1]
    assert 1e-4 < float((alone - together).abs()) < 0.05
    assert ADAPTIVE_SOLVERS == ("dopri5",)


def test_adaptive_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ConfigError, match=r"not installed; pip install 'merge_rl\[adap"):
        solve_adaptive(lambda x, t: x, X, 0.0, 1.0)


def test_recorded_runs_have_the_grid_of_the_config(golden: Path) -> None:
    # The official count is of grid points, ours of intervals.
    for points in (5, 11):
        data = load_file(golden / f"sit/sampler/ode_euler_n{points}.safetensors")
        torch.testing.assert_close(time_grid(points - 1), data["t_grid"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("open_end", "expected"), [(True, 5.0), (False, 9.0)])
def test_the_last_interval_of_an_open_end_is_eulers(open_end: bool, expected: float) -> None:
    # dx/dt = 2 t from 0: heun is exact, 1 at 1 and 9 at 3; Euler goes from 1 to 1 + 2 * 2.
    asked = list[float]()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        return 2 * t * torch.ones_like(x)

    times = torch.tensor([0.0, 1.0, 3.0])
    found = solve_fixed(velocity, torch.zeros(1, 1), times, solver="heun", open_end=open_end)
    assert found.item() == expected
    assert (3.0 in asked) is not open_end
