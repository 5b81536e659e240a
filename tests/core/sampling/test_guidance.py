"""Where guidance holds: which calls it weighs, its derivative by strength and ends, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_rl.config import SamplerConfig
from merge_rl.core.sampling.guidance import Guidance, autoguided, grid_of, guidance_of
from merge_rl.core.sampling.sampler import sample, sample_with
from merge_rl.errors import ConfigError

F64 = torch.float64


class Noted:
    """D(x; sigma) = 0, or v(x, t) = 0, that notes where it is asked."""

    def __init__(self, prediction: str = "denoised", **said: Any) -> None:
        self.prediction, self.asked = prediction, list[float]()
        vars(self).update(said)

    def __call__(self, x: Tensor, t: Tensor, _labels: Tensor | None = None, /) -> Tensor:
        self.asked.append(round(float(t), 6))
        return torch.zeros_like(x)


def asked(settings: dict[str, Any], prediction: str, **said: Any) -> list[float]:
    """Where a guide is asked."""
    guide = Noted(prediction, **said)
    sample(
        Noted(prediction, **said), torch.ones(1, 1, 1, 1), guide=guide, guidance=2.0, **settings
    )  # fmt: skip
    return guide.asked


def levels(*values: float) -> Any:
    return lambda _steps, dtype: torch.tensor([*values, 0.0], dtype=dtype)


def test_noise_levels_above_low_up_to_high_are_guided() -> None:
    own = {"noise_levels": levels(8.0, 4.0, 2.0, 1.0)}
    euler = {"solver": "euler", "num_steps": 4}
    assert asked(euler, "denoised", **own) == [8, 4, 2, 1]
    assert asked({**euler, "guidance_interval": (1.0, 4.0)}, "denoised", **own) == [4, 2]
    # Each call of a step of Heun's is looked at by itself: the one at level 2 of the step from 4,
    # and again that of the step from 2, whose end at 1 is outside.
    heun = {"num_steps": 4, "guidance_interval": (1.0, 4.0)}
    assert asked(heun, "denoised", **own) == [4, 4, 2, 2]


def test_times_are_guided_from_noise_on_where_the_interval_begins_with_0() -> None:
    def found(low: float, high: float) -> list[float]:
        said = {"solver": "euler", "num_steps": 5, "guidance_interval": (low, high)}
        return asked(said, "velocity")

    assert found(0.0, 0.4) == [0, 0.2, 0.4]
    # 0.2 in float32 is above 0.2: the end is compared in the grid's precision.
    assert found(0.2, 1.0) == [0.4, 0.6, 0.8]


def test_a_step_that_an_end_cuts_is_guided_by_its_share() -> None:
    grid = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0], dtype=F64)
    held = Guidance(torch.tensor([3.0, 1.25, 5.0], dtype=F64), grid)
    # Of 8..4 a quarter lies below 5; of 2..1 three quarters above 1.25: 1 + 2 s.
    weights = [held.at(torch.tensor(level)) for level in (8.0, 4.0, 3.0, 2.0, 1.0)]
    assert weights == [1.5, 3.0, 3.0, 2.5, 1.0]
    rising = Guidance(
        torch.tensor([3.0, 0.25, 0.75], dtype=F64), torch.tensor([0, 0.5, 1]).double()
    )
    assert [rising.at(torch.tensor(t)) for t in (0.0, 0.5, 0.9, 1.0)] == [2.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint", "heun3", "rk4"])
def test_ends_on_the_grid_are_sharp_for_noise_levels(solver: str) -> None:
    own = {"noise_levels": levels(8.0, 4.0, 2.0, 1.0)}
    said = {"solver": solver, "num_steps": 4, "guidance_interval": (1.0, 4.0)}
    sharp, shared = (asked({**said, "guidance_ends": e}, "denoised", **own)
                     for e in ("sharp", "shared"))  # fmt: skip
    assert sharp == [level for level in shared if level > 1]


@pytest.mark.parametrize("solver", ["euler", "heun", "rk4", "sde-euler", "sde-heun"])
@pytest.mark.parametrize("prediction", ["denoised", "velocity"])
def test_the_whole_interval_is_guidance_everywhere(solver: str, prediction: str) -> None:
    said: dict[str, Any] = {"solver": solver, "num_steps": 5, "guidance": 1.7}
    model, guide = _Linear(prediction, 0.8), _Linear(prediction, 0.3)
    noise = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    everywhere = sample(model, noise, guide=guide, **said)
    for ends in ("sharp", "shared"):
        inside = sample(
            model, noise, guide=guide, guidance_interval=(0.0, math.inf), guidance_ends=ends, **said
        )
        assert torch.equal(inside, everywhere)
    assert not torch.equal(sample(model, noise, solver=solver, num_steps=5), everywhere)


class _Linear:
    """gain tanh(x)."""

    def __init__(self, prediction: str, gain: float) -> None:
        self.prediction, self.gain = prediction, gain

    def __call__(self, x: Tensor, _t: Tensor, _labels: Tensor | None = None, /) -> Tensor:
        return self.gain * torch.tanh(x)


class _Wide:
    """A network of float64, whatever it is given: what differences are taken of must be exact."""

    def __init__(self, prediction: str, gain: float) -> None:
        self.prediction, self.gain = prediction, gain

    def __call__(self, x: Tensor, t: Tensor, _labels: Tensor | None = None, /) -> Tensor:
        return self.gain * torch.tanh(x.double()) + 0.01 * float(t) * x.double()


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint", "heun3", "rk4"])
@pytest.mark.parametrize("prediction", ["denoised", "velocity"])
def test_samples_have_a_derivative_by_strength_and_ends(
    solver: str, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The state goes to the network in float32, whose rounding would drown a small difference.
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    settings = SamplerConfig(solver=solver, num_steps=4, sigma_max=3.0, sigma_min=0.1)
    model, guide = _Wide(prediction, 0.9), _Wide(prediction, 0.2)
    noise = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=F64)

    def total(values: Tensor) -> Tensor:
        made = sample_with(settings, model, noise, guide=guide, dtype=F64, guidance=values,
                           through=lambda evaluate: evaluate)  # fmt: skip
        return (made * torch.arange(made.numel()).reshape(made.shape)).sum()

    # Inside the grid, off its levels, in two different steps.
    ends = (0.3, 1.9) if prediction == "denoised" else (0.1, 0.8)
    point = torch.tensor([1.6, *ends], dtype=F64, requires_grad=True)
    total(point).backward()  # type: ignore[no-untyped-call]
    width = 1e-5
    for i in range(3):
        step = torch.zeros(3, dtype=F64)
        step[i] = width
        with torch.no_grad():
            slope = (total(point + step) - total(point - step)) / (2 * width)
        assert abs(float(slope)) > 1e-3
        # Central differences of a smooth function: (width)^2 of its third derivative, and the
        # rounding of the function over the width.
        torch.testing.assert_close(point.grad[i], slope, rtol=1e-7, atol=1e-8)  # type: ignore[index]


def test_a_strength_of_1_has_a_derivative_and_the_samples_of_no_guidance() -> None:
    model, guide = _Linear("denoised", 0.9), _Linear("denoised", 0.2)
    noise = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(2))
    values = torch.tensor([1.0, 0.0, 80.0], dtype=F64, requires_grad=True)
    settings = SamplerConfig(num_steps=3)
    made = sample_with(settings, model, noise, guide=guide, guidance=values,
                       through=lambda evaluate: evaluate)  # fmt: skip
    made.sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert float(values.grad[0]) != 0
    assert values.grad[1:].tolist() == [0, 0]  # without strength ends change nothing
    assert torch.equal(made, sample_with(settings, model, noise))


def test_settings_hold_everywhere_unless_they_say_where() -> None:
    said = SamplerConfig(guidance=2.0)
    grid = grid_of(said, Noted("velocity"))
    assert guidance_of(said, grid).at(torch.tensor(0.5)) == 2
    assert grid_of(SamplerConfig(solver="dopri5"), Noted("velocity")) is None
    sde = grid_of(SamplerConfig(solver="sde-euler", num_steps=4), Noted("velocity"))
    assert sde is not None
    torch.testing.assert_close(sde, torch.tensor([0, 0.32, 0.64, 0.96, 1.0]).double())
    noisy = SamplerConfig(solver="sde-euler", num_steps=4, last_step="none")
    without = grid_of(noisy, Noted("velocity"))  # which ends where the path does
    assert without is not None
    assert without.tolist() == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize(
    "interval", [(2.0, 1.0), (1.0, 1.0), (-1.0, 1.0), (0.5,), (float("nan"), 1)]
)
def test_what_is_no_interval_is_refused(interval: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="guidance_interval two numbers, 0 <= LOW < HIGH, got"):
        SamplerConfig(guidance_interval=interval)  # type: ignore[arg-type]


def test_an_adaptive_solver_has_no_steps_to_share() -> None:
    with pytest.raises(ConfigError, match="dopri5 chooses its own steps"):
        asked({"solver": "dopri5", "guidance_ends": "shared"}, "velocity")


def test_a_weight_of_one_is_the_strong_network_and_has_its_derivative() -> None:
    # D = 5 x + w' 3 x at weights 1 + w': the derivative is 3 (x1 + x2).
    x, sigma = torch.tensor([[2.0], [0.7]]), torch.ones(2)
    weight = torch.tensor(1.0, requires_grad=True)
    found = autoguided(lambda x, *_: 5 * x, lambda x, *_: 2 * x, weight)(x, sigma)
    assert torch.equal(found, 5 * x)
    (slope,) = torch.autograd.grad(found.sum(), weight)
    torch.testing.assert_close(slope, torch.tensor(8.1))
