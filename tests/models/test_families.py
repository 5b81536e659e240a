"""DiT, REPA and JiT against their official implementations: outputs and samples."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from merge_rl.core.network import Network
from merge_rl.core.sampling.compatibility import count_network_calls, has_open_end
from merge_rl.core.sampling.sampler import sample
from merge_rl.core.sampling.steps import StepLevels, linear_betas
from merge_rl.errors import ConfigError
from merge_rl.registry import build_model

OUTPUT, SAMPLES = 2e-5, 5e-5  # relative to the largest value


def _golden(golden: Path, name: str) -> tuple[Network, dict[str, Tensor]]:
    with safe_open(golden / name / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    model = build_model(config)
    weights = {k.removeprefix("weights."): t for k, t in tensors.items() if k.startswith("weights")}
    own = {k: t for k, t in weights.items() if k in model.state_dict()}
    assert all(k.startswith(("projectors.", "feat_rope")) for k in weights.keys() - own.keys())
    model.load_state_dict(own)
    return model.eval(), tensors


def _close(found: Tensor, expected: Tensor, bound: float) -> None:
    assert float((found - expected).abs().max()) <= bound * float(expected.abs().max())


@torch.no_grad()
def test_dit_denoises_by_the_official_noise(golden: Path) -> None:
    model, data = _golden(golden, "dit")
    sigmas = StepLevels(linear_betas()).log_sigmas
    sigma = torch.tensor([sigmas[int(step)] for step in data["t"]], dtype=torch.float64).exp()
    wide = sigma.reshape(-1, 1, 1, 1)
    x = data["x"].double() * (1 + wide.square()).sqrt()  # unit variance inside the network
    denoised = model(x.float(), sigma.float(), data["y"])
    noise = (x - denoised) / wide
    # D is x - sigma e in float32: what is left of e carries its rounding, in units of x / sigma.
    rounding = torch.finfo(torch.float32).eps * (x.abs() + wide * noise.abs()) / wide
    bound = OUTPUT * float(data["noise"].abs().max()) + 4 * rounding
    assert ((noise - data["noise"]).abs() <= bound).all()


@pytest.mark.parametrize(("name", "guidance"), [("ddim10", 1.0), ("ddim10_cfg1p5", 1.5)])
@torch.no_grad()
def test_euler_in_noise_levels_is_ddim(golden: Path, name: str, guidance: float) -> None:
    model, data = _golden(golden, "dit")
    # DDPM starts at unit variance of signal and noise together: sqrt(1 + sigma^2) for sigma.
    first = float(StepLevels(linear_betas()).ladder(10)[0])
    noise = data["x"] * (1 + first**-2) ** 0.5
    found = sample(model, noise, data["y"], solver="euler", num_steps=10, guidance=guidance)
    _close(found, data[name], SAMPLES)


@torch.no_grad()
def test_repa_is_asked_forwards_in_time(golden: Path) -> None:
    model, data = _golden(golden, "repa")
    _close(-model(data["x"], 1 - data["t"], data["y"]), data["v"], OUTPUT)


@pytest.mark.parametrize(("name", "guidance"), [("", 1.0), ("_cfg1p5", 1.5)])
@torch.no_grad()
def test_repa_samples_are_the_official_ones(golden: Path, name: str, guidance: float) -> None:
    model, data = _golden(golden, "repa")
    ask = partial(
        sample, model, data["x"], data["y"], guidance=guidance, guidance_channels=None,
        dtype=torch.float64,
    )  # fmt: skip
    _close(ask(solver="euler", num_steps=6), data[f"euler6{name}"], SAMPLES)
    draws = iter(data["draws"])
    found = ask(solver="sde-euler", num_steps=5, draw=lambda: next(draws))
    _close(found, data[f"sde5{name}"], SAMPLES)


@torch.no_grad()
def test_jit_predicts_the_official_data(golden: Path) -> None:
    model, data = _golden(golden, "jit")
    _close(model.data(data["x"], data["t"], data["y"]), data["data"], OUTPUT)  # type: ignore[operator]
    left = (1 - data["t"]).clamp_min(0.05).reshape(-1, 1, 1, 1)  # the last time is 0.99
    velocity = (data["data"] - data["x"]) / left
    _close(model(data["x"], data["t"], data["y"]), velocity, 2 * OUTPUT)


@pytest.mark.parametrize("solver", ["heun", "euler"])
@pytest.mark.parametrize(("name", "guidance"), [("", 1.0), ("_cfg2", 2.0)])
@torch.no_grad()
def test_jit_samples_are_the_official_ones(
    golden: Path, solver: str, name: str, guidance: float
) -> None:
    model, data = _golden(golden, "jit")
    ask = partial(sample, model, data["start"], data["y"], solver=solver, num_steps=4)
    _close(ask(guidance=guidance), data[f"{solver}4{name}"], SAMPLES)


def test_the_last_interval_of_an_open_end_costs_one_call(golden: Path) -> None:
    model, _ = _golden(golden, "jit")
    assert has_open_end(model)
    assert count_network_calls("heun", 4, prediction="velocity", open_end=True) == 7
    assert count_network_calls("heun", 4, prediction="velocity", open_end=False) == 8


def test_noise_of_another_scale_has_no_sde(golden: Path) -> None:
    model, data = _golden(golden, "jit")
    with pytest.raises(ConfigError, match=r"noise of unit variance; this network's .* 1\.5"):
        sample(model, data["start"], data["y"], solver="sde-euler", num_steps=4)


def test_levels_of_steps_derived_by_hand() -> None:
    # a = 1/2, 1/4: sigma^2 = (1 - a) / a = 1, 3.
    levels = StepLevels(torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(levels.ladder(2), torch.tensor([3**0.5, 1.0, 0.0]))
    between = torch.tensor([0.1, 1.0, 3**0.25, 3**0.5, 9.0])  # beyond both ends: the ends
    expected = torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0])
    torch.testing.assert_close(levels.step_of(between), expected)


def test_the_ladder_visits_the_steps_of_the_public_sampler() -> None:
    levels = StepLevels(linear_betas())
    steps = levels.step_of(levels.ladder(10)[:-1])
    assert steps.tolist() == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert levels.step_of(levels.ladder(250)[:-1]).tolist() == [
        round(i * 999 / 249) for i in reversed(range(250))
    ]


@pytest.mark.parametrize("betas", [[], [0.1], [0.1, 1.0], [0.0, 0.1], [[0.1, 0.2]]])
def test_betas_that_cannot_be_are_refused(betas: list[float]) -> None:
    with pytest.raises(ConfigError, match="expected two or more betas"):
        StepLevels(torch.tensor(betas))


@pytest.mark.parametrize("num_steps", [1, 1001])
def test_a_ladder_has_no_more_rungs_than_steps(num_steps: int) -> None:
    with pytest.raises(ConfigError, match=r"num_steps in 2\.\.1000"):
        StepLevels(linear_betas()).ladder(num_steps)
