"""Paths, conversions and diffusion forms against recorded tables, and by their definitions."""

from __future__ import annotations

import math
from pathlib import Path as File

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from merge_rl.config.sampler import DIFFUSIONS, PATH_NAMES
from merge_rl.core.sampling.paths import (
    PATHS,
    drift,
    make_path,
    noise_from_velocity,
    score_from_velocity,
)
from merge_rl.core.sampling.sde import FORMS, diffusion, require_finite_diffusion
from merge_rl.errors import ConfigError, UnknownNameError

TABLE = {"linear": "Linear", "gvp": "GVP", "vp": "VP"}
TIMES = torch.tensor([0.0, 1e-6, 0.1, 0.5, 0.9, 1 - 1e-6, 1.0], dtype=torch.float64)


def test_names_are_those_of_the_config() -> None:
    assert tuple(PATHS) == PATH_NAMES
    assert tuple(FORMS) == DIFFUSIONS


@pytest.mark.parametrize("name", PATHS)
def test_recorded_tables(name: str, golden: File) -> None:
    data = load_file(golden / "sit/sampler/path_tables.safetensors")
    table = {k.partition(".")[2]: v for k, v in data.items() if k.startswith(TABLE[name] + ".")}
    path, t, x, v = make_path(name), table["t"], table["x"], table["v"]
    found = {
        "alpha": path.alpha(t),
        "sigma": path.sigma(t),
        "d_alpha": path.d_alpha(t),
        "d_sigma": path.d_sigma(t),
        "score_from_velocity": score_from_velocity(path, v, x, t),
        "noise_from_velocity": noise_from_velocity(path, v, x, t),
        "velocity_from_score": drift(path, x, t) + path.score_rate(t) * v,  # v as a score
        "drift_mean": -drift(path, x, t),  # recorded with the other sign
        "drift_var": path.score_rate(t),
        "diffusion_SBDM": diffusion("sbdm", path, t),
        **{f"diffusion_{f}": diffusion(f, path, t) for f in ("sigma", "linear", "decreasing")},
    }
    assert set(found) == set(table) - {"t", "x", "v"}
    for key, values in found.items():
        torch.testing.assert_close(values, table[key], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", PATHS)
def test_conversions_find_what_was_mixed(name: str) -> None:
    # At both ends as well: nothing there is 0 / 0 but what has no value.
    path, d, e = make_path(name), torch.tensor(1.5).double(), torch.tensor(-0.7).double()
    t = TIMES[TIMES.le(path.end)]
    x = path.alpha(t) * d + path.sigma(t) * e
    v = path.d_alpha(t) * d + path.d_sigma(t) * e
    torch.testing.assert_close(noise_from_velocity(path, v, x, t), e.expand_as(t))
    inner = slice(1, -1) if path.end == 1 else slice(1, None)
    score = score_from_velocity(path, v, x, t)[inner]
    torch.testing.assert_close(score, -e / path.sigma(t[inner]))
    back = drift(path, x[inner], t[inner]) + path.score_rate(t[inner]) * score
    torch.testing.assert_close(back, v[inner])


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_and_ends(name: str) -> None:
    path = make_path(name)
    t = TIMES[2:5].clone().requires_grad_()
    for value, slope in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        (exact,) = torch.autograd.grad(value(t).sum(), t)
        torch.testing.assert_close(slope(t).detach(), exact)
    (log_slope,) = torch.autograd.grad(path.alpha(t).log().sum(), t)
    torch.testing.assert_close(path.log_slope(t).detach(), log_slope)
    zero, one = TIMES[:1], TIMES[-1:]
    assert float(path.alpha(one)) == 1
    assert float(path.sigma(one)) == pytest.approx(0, abs=1e-15)
    assert float(path.alpha(zero)) == pytest.approx(0, abs=7e-3)  # VP ends in almost pure noise
    assert float(path.sigma(zero)) == pytest.approx(1, abs=3e-5)


def test_vp_keeps_its_digits_near_the_data() -> None:
    # sigma^2 = 1 - exp(2 l) with l = -0.05 h - 4.975 h^2: to first order 0.1 h.
    h = torch.tensor(1e-12, dtype=torch.float64)
    assert float(make_path("vp").sigma(1 - h) ** 2) == pytest.approx(1e-13, rel=1e-3)


def test_diffusion_forms_by_hand() -> None:
    # At t = 1/4 with norm 3: cos(pi/4) = sin(pi/4) = sqrt(1/2).
    path, t, root = make_path("linear"), torch.tensor(0.25).double(), math.sqrt(0.5)
    expected = {
        "sigma": 3 * 0.75,
        "linear": 3 * 0.75,
        "decreasing": 0.25 * (3 * root + 1) ** 2,
        "sbdm": 3 * 0.75 / 0.25,
        "constant": 3.0,
        "increasing-decreasing": 3 * 0.5,
    }
    for form, value in expected.items():
        assert float(diffusion(form, path, t, norm=3.0)) == pytest.approx(value, rel=1e-12)
    assert float(diffusion("sigma", make_path("gvp"), t)) == pytest.approx(math.cos(math.pi / 8))
    assert float(diffusion("sbdm", make_path("vp"), t)) == pytest.approx((0.1 + 0.75 * 19.9) / 2)


@pytest.mark.parametrize("name", ["linear", "gvp"])
def test_infinite_diffusion_is_refused(name: str) -> None:
    path = make_path(name)
    message = (
        rf"'sbdm' is infinite at t = 0 on the {name} path, so every sample would be non-finite; "
        "expected one of sigma, linear, decreasing, constant, increasing-decreasing"
    )
    with pytest.raises(ConfigError, match=message):
        require_finite_diffusion("sbdm", path, TIMES)
    assert bool(require_finite_diffusion("sbdm", path, TIMES[1:-1]).isfinite().all())
    assert bool(require_finite_diffusion("sbdm", make_path("vp"), TIMES).isfinite().all())


def test_refusals() -> None:
    path, one = make_path("linear"), torch.ones([])
    with pytest.raises(UnknownNameError, match="unknown path 'liner'; did you mean 'linear'"):
        make_path("liner")
    with pytest.raises(UnknownNameError, match="unknown diffusion form 'sigme'; .* 'sigma'"):
        diffusion("sigme", path, one)
    for odd in (-0.1, 1.5, math.nan):
        t = torch.tensor([0.5, odd])
        for call in (noise_from_velocity, score_from_velocity):
            with pytest.raises(ConfigError, match=r"expected times in 0\.\.1, found"):
                call(path, one, one, t)
        with pytest.raises(ConfigError, match=r"expected times in 0\.\.1, found"):
            diffusion("sigma", path, t)


def test_single_precision_stays_single() -> None:
    for name in PATHS:
        path, t = make_path(name), torch.tensor(0.25)
        values: list[Tensor] = [path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)]
        assert {value.dtype for value in [*values, *path.inverse(t)]} == {torch.float32}
