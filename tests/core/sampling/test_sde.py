"""SDE steps on the Gaussian problem: marginals, weak order, log-probabilities, refusals."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from merge_rl.core.sampling.edm import EDMSDE, edm_noise_levels
from merge_rl.core.sampling.paths import make_path, time_grid
from merge_rl.core.sampling.sde import SDE, PathSDE, noisy_step, solve_sde, step_log_prob
from merge_rl.errors import ConfigError
from tests.gaussian import MEAN, STD, denoised, path_moments, path_velocity

ZERO, ONE = (torch.full((1, 1), v, dtype=torch.float64) for v in (0.0, 1.0))


class Moments(NamedTuple):
    mean: float
    variance: float


def affine(sde: SDE, index: int) -> tuple[float, float, float]:
    """a, b, c of step `index`, which on this problem is x -> a x + b + c z."""
    x, z = (torch.tensor(v, dtype=torch.float64)[:, None] for v in ((0, 1, 0), (0, 0, 1)))
    at = noisy_step(sde, index, x, z).x_next[:, 0].tolist()
    return at[1] - at[0], at[0], at[2] - at[0]


def after_noisy_steps(sde: SDE, start: Moments) -> list[Moments]:
    """Mean and variance after every noisy step, without drawing anything."""
    (m, v), found = start, []
    for i in range(sde.num_noisy):
        a, b, c = affine(sde, i)
        m, v = a * m + b, a * a * v + c * c
        found.append(Moments(m, v))
    return found


def end(sde: SDE) -> Moments:
    """Mean and variance of the samples that unit noise gives."""
    start = sde.start(ONE).item()
    m, v = after_noisy_steps(sde, Moments(0.0, start**2))[-1]
    low, high = sde.last(ZERO).item(), sde.last(ONE).item()
    return Moments((high - low) * m + low, (high - low) ** 2 * v)


def path_sde(num_noisy: int, path: str = "linear", **settings: object) -> PathSDE:
    options = {"last_step": "none", "form": "sigma", "norm": 1.0, "heun": False, **settings}
    kept = 1.0 if options["last_step"] == "none" else 0.96
    chosen = make_path(path)
    times = time_grid(num_noisy, end=min(kept, chosen.end), dtype=torch.float64)
    velocity = path_velocity(chosen)
    return PathSDE(velocity=velocity, path=chosen, times=times, **options)  # type: ignore[arg-type]


def edm_sde(num_steps: int, norm: float = 1.0, heun: bool = False, std: float = STD) -> EDMSDE:
    sigmas = edm_noise_levels(num_steps, sigma_max=20.0, dtype=torch.float64)
    return EDMSDE(
        denoise=lambda x, s: denoised(x, s, std), sigmas=sigmas, norm=norm, heun=heun
    )  # fmt: skip


# ------------------------------------------------------------------------------------ marginals

PATH_CASES = [
    ("linear", "sigma", 1.0), ("linear", "sigma", 0.3), ("linear", "linear", 2.0),
    ("linear", "decreasing", 1.0), ("linear", "increasing-decreasing", 1.0),
    ("gvp", "sigma", 1.0), ("gvp", "linear", 1.0), ("vp", "sigma", 1.0), ("vp", "linear", 0.5),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "form", "norm", "heun"),
    [(*case, False) for case in PATH_CASES] + [(*case, True) for case in PATH_CASES[::2]],
)
def test_a_path_keeps_its_marginals(path: str, form: str, norm: float, heun: bool) -> None:
    # Started right at t = 0, it is at t = 0.96 where the ODE is, but for an error that halves with
    # the step: weak order 1.
    errors = []
    for num_noisy in (80, 160):
        sde = path_sde(num_noisy, path, form=form, norm=norm, heun=heun, last_step="mean")
        ends = [path_moments(sde.path, t) for t in (sde.times[0], sde.times[-1])]
        start, exact = (Moments(m.item(), v.item()) for m, v in ends)
        found = after_noisy_steps(sde, start)[-1]
        errors.append([abs(a - b) for a, b in zip(found, exact, strict=True)])
    for coarse, fine in zip(*errors, strict=True):
        assert fine < 0.02
        assert fine < 0.6 * coarse or fine < 2e-4


@pytest.mark.parametrize("norm", [0.25, 1.0, 2.0])
@pytest.mark.parametrize(("heun", "order"), [(False, 1), (True, 2)])
def test_a_denoiser_keeps_its_marginals(heun: bool, order: int, norm: float) -> None:
    errors = []
    for num_steps in (80, 160):
        sde = edm_sde(num_steps, norm, heun)
        start = Moments(MEAN, STD**2 + sde.sigmas[0].item() ** 2)
        found = after_noisy_steps(sde, start)[-1]
        assert found.mean == pytest.approx(MEAN, abs=1e-9)
        errors.append(abs(found.variance - STD**2 - sde.sigmas[-2].item() ** 2))
    assert errors[-1] < 0.01
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine > 0.85 * 2**order


@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("num_steps", [3, 8])
def test_a_point_of_data_is_kept_exactly_by_any_grid(num_steps: int, norm: float) -> None:
    # D is constant then, and the step is exact: variance sigma^2 at every level, however far apart.
    sde = edm_sde(num_steps, norm, std=0.0)
    found = after_noisy_steps(sde, Moments(MEAN, sde.sigmas[0].item() ** 2))
    expected = sde.sigmas[1:-1].square().tolist()
    assert [m.variance for m in found] == pytest.approx(expected)
    assert end(sde) == pytest.approx((MEAN, 0.0), abs=1e-9)


def test_without_diffusion_an_sde_is_the_ode() -> None:
    sde = path_sde(20, norm=0.0)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    found = solve_sde(sde, x, lambda: torch.full_like(x, 9.0))
    for t, t_next in itertools.pairwise(sde.times):
        x = x + (t_next - t) * sde.velocity(x, t)
    torch.testing.assert_close(found, x)


@pytest.mark.parametrize(
    "sde", [path_sde(60, last_step="mean"), path_sde(60, "gvp", heun=True, last_step="tweedie"),
            edm_sde(40), edm_sde(40, heun=True)],
)  # fmt: skip
def test_drawn_samples_have_these_moments(sde: SDE, generator: torch.Generator) -> None:
    count = 40_000

    def draw() -> Tensor:
        return torch.randn(count, 1, generator=generator, dtype=torch.float64)

    samples, expected = solve_sde(sde, draw(), draw), end(sde)
    # Standard errors of a mean and of a variance of normal samples; 4.5 of them.
    assert float(samples.mean()) == pytest.approx(
        expected.mean, abs=4.5 * math.sqrt(expected.variance / count)
    )
    assert float(samples.var()) == pytest.approx(expected.variance, rel=4.5 * math.sqrt(2 / count))


def test_last_steps_by_hand() -> None:
    # Linear, t1 = 0.96, d = 0.04, v = 2, x = 3: e = x - t1 v = 1.08 and S = -e / 0.04 = -27.
    x = torch.full((1, 1), 3.0, dtype=torch.float64)

    def last(name: str, kind: str = "linear") -> float:
        path = make_path(kind)
        times = time_grid(3, end=0.96, dtype=torch.float64)
        sde = PathSDE(
            velocity=lambda x, t: torch.full_like(x, 2.0), path=path, times=times, last_step=name,
            norm=0.5,
        )  # fmt: skip
        return sde.last(x).item()

    assert last("none") == 3.0
    assert last("euler") == pytest.approx(3 + 2 * 0.04)
    # w = 0.5 sigma = 0.02.
    assert last("mean") == pytest.approx(3 + (2 + 0.02 * -27) * 0.04)
    # The mean of the data given x: x + (1 - t1) v on this path.
    assert last("tweedie") == pytest.approx(3.08)
    # On GVP x = a x1 + b e and v = pi / 2 (b x1 - a e), with a, b = sin, cos of 0.48 pi.
    angle = 0.48 * math.pi
    assert last("euler", "gvp") == pytest.approx(3.08)
    expected = 3 * math.sin(angle) + 4 / math.pi * math.cos(angle)
    assert last("tweedie", "gvp") == pytest.approx(expected)


# ------------------------------------------------------------------------------ log-probabilities


def test_log_prob_is_that_of_torch(generator: torch.Generator) -> None:
    mean = torch.randn(3, 4, 5, 5, generator=generator)
    drawn = mean + 0.3 * torch.randn(mean.shape, generator=generator)
    std = torch.tensor(0.3)
    normal = Independent(Normal(mean.double(), std.double()), 3)
    expected = normal.log_prob(drawn.double())  # type: ignore[no-untyped-call]
    found = step_log_prob(drawn, mean, std)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


def test_a_step_that_draws_nothing_has_log_prob_zero() -> None:
    # "increasing-decreasing" begins with w = 0.
    sde = path_sde(5, form="increasing-decreasing")
    step = noisy_step(sde, 0, ONE, ONE)
    assert float(step.std) == 0
    assert step.log_prob.tolist() == [0.0]


@pytest.mark.parametrize("family", ["path", "edm"])
def test_log_prob_of_a_kept_step_has_the_gradient_of_its_mean(family: str) -> None:
    # The network is gain * x. d log p / d gain = (drawn - mean) / std^2 * d mean / d gain.
    gain = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    sde: SDE
    if family == "path":
        times = time_grid(4, end=0.96, dtype=torch.float64)
        sde = PathSDE(velocity=lambda x, t: gain * x, path=make_path("linear"), times=times)
    else:
        sigmas = edm_noise_levels(4, sigma_max=3.0, dtype=torch.float64)
        sde = EDMSDE(denoise=lambda x, s: gain * x, sigmas=sigmas)
    x, z = torch.tensor([[0.4, -1.0]], dtype=torch.float64), torch.tensor([[0.5, 2.0]])
    with torch.no_grad():
        kept = noisy_step(sde, 1, x, z)
    torch.testing.assert_close(kept.x_next, kept.mean + kept.std * z)
    mean, std = sde.gaussian(1, x)
    log_prob = step_log_prob(kept.x_next, mean, std)
    torch.testing.assert_close(log_prob.detach(), kept.log_prob)
    (found,) = torch.autograd.grad(log_prob.sum(), gain)
    (slope,) = torch.autograd.grad(sde.gaussian(1, x).mean, gain, grad_outputs=z.double())
    torch.testing.assert_close(found, slope / std)


def test_heun_draws_before_it_calls_the_network() -> None:
    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("called")

    times = time_grid(4, end=0.96, dtype=torch.float64)
    sde = PathSDE(velocity=never, path=make_path("linear"), times=times, heun=True)
    mean, std = sde.gaussian(1, ONE)
    assert mean is ONE
    # w = sigma(0.24) = 0.76, h = 0.24.
    assert float(std) == pytest.approx(math.sqrt(2 * 0.76 * 0.24))
    step = noisy_step(path_sde(4, heun=True, last_step="mean"), 1, ONE, ONE)
    torch.testing.assert_close(step.drawn, ONE + std)
    assert not torch.equal(step.x_next, step.drawn)
    assert step.log_prob.tolist() == pytest.approx(
        [-0.5 - math.log(std) - math.log(2 * math.pi) / 2]
    )


# -------------------------------------------------------------------------------------- refusals


def test_what_is_infinite_is_refused() -> None:
    for path in ("linear", "gvp"):
        with pytest.raises(ConfigError, match=f"'sbdm' is infinite at t = 0 on the {path} path"):
            path_sde(10, path, form="sbdm")
        with pytest.raises(ConfigError, match=r"sde-heun without a last step .* t = 1, where the"):
            path_sde(10, path, heun=True)
    for form in ("sbdm", "constant"):
        assert math.isfinite(end(path_sde(200, "vp", form=form, last_step="mean")).variance)
    assert math.isfinite(end(path_sde(200, "vp", heun=True)).variance)
