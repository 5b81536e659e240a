"""The EDM solver against the official sampler, and against solutions known in closed form."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from merge_rl.core.sampling import Churn, count_network_calls, sample, solve_edm
from merge_rl.core.schedules import edm_noise_levels
from merge_rl.errors import ConfigError, UnknownNameError
from merge_rl.models.edm2 import EDM2
from merge_rl.rng import ImageStreams

CASES = json.loads((Path(__file__).parents[1] / "golden/edm2/sampler/cases.json").read_text())[
    "cases"
]


def _net(golden: Path, name: str) -> EDM2:
    config = json.loads((golden / "edm2/tiny/configs.json").read_text())[name]["config"]
    model = EDM2(**config).eval()
    model.load_state_dict(load_file(golden / f"edm2/tiny/{name}.weights.safetensors"))
    return model


@pytest.mark.parametrize("name", sorted(CASES))
def test_golden_runs(golden: Path, name: str) -> None:
    case, data = CASES[name], load_file(golden / f"edm2/sampler/{name}.safetensors")
    kwargs = dict(case["kwargs"])
    dtype = getattr(torch, kwargs.pop("dtype"))
    churn = Churn(
        amount=kwargs.pop("S_churn", 0.0),
        sigma_min=kwargs.pop("S_min", 0.0),
        sigma_max=kwargs.pop("S_max", float("inf")),
        noise_scale=kwargs.pop("S_noise", 1.0),
    )
    model, calls = _net(golden, case["net"]), []

    def counted(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        calls.append(sigma.clone())
        denoised: Tensor = model(x, sigma, labels)
        return denoised

    draws = iter(data["randn"]) if "randn" in data else iter(())
    guide = _net(golden, case["gnet"]) if case["gnet"] else None
    found = sample(
        counted, data["noise"], data.get("class_labels"), guide=guide, dtype=dtype, churn=churn,
        draw=lambda: next(draws), **kwargs,
    )  # fmt: skip
    assert len(calls) == case["num_net_calls"] == count_network_calls("heun", kwargs["num_steps"])
    assert next(draws, None) is None
    expected = data["output"]
    assert found.dtype == dtype
    torch.testing.assert_close(torch.stack(calls), data["sigma_calls"].float(), rtol=1e-6, atol=0)
    tolerance = 2e-4 if name == "cond_n2" else 5e-5
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.mark.parametrize("name", sorted(CASES))
def test_noise_levels(golden: Path, name: str) -> None:
    data = load_file(golden / f"edm2/sampler/{name}.safetensors")
    kwargs = CASES[name]["kwargs"]
    settings = {k: kwargs[k] for k in ("sigma_min", "sigma_max", "rho") if k in kwargs}
    for key, dtype in (("t_steps_float64", torch.float64), ("t_steps", data["t_steps"].dtype)):
        found = edm_noise_levels(kwargs["num_steps"], dtype=dtype, **settings)
        torch.testing.assert_close(found, data[key], rtol=1e-6, atol=0)


def test_noise_of_image_seeds_equals_the_official_order(golden: Path) -> None:
    data = load_file(golden / "edm2/sampler/per_seed_noise_cpu.safetensors")
    seeds = data["seeds"].tolist()
    small, large = ImageStreams(seeds), ImageStreams(seeds)
    assert torch.equal(small.randn((4, 8, 8)), data["noise_4x8x8"])
    assert torch.equal(small.randint(10), data["labels_10_after_4x8x8"])
    assert torch.equal(small.randn((4, 8, 8)), data["churn1_4x8x8"])
    assert torch.equal(small.randn((4, 8, 8)), data["churn2_4x8x8"])
    assert torch.equal(large.randn((3, 16, 16)), data["noise_3x16x16"])
    assert torch.equal(large.randint(1000), data["labels_1000_after_3x16x16"])


def test_samples_do_not_depend_on_the_batch_size(golden: Path) -> None:
    model = _net(golden, "cond")

    def run(batch: int) -> Tensor:
        parts = []
        for start in range(0, 100, batch):
            streams = ImageStreams(range(start, min(start + batch, 100)))
            noise = streams.randn((4, 8, 8))
            parts.append(sample(model, noise, streams.randint(10), num_steps=4))
        return torch.cat(parts)

    whole = run(100)
    for batch in (1, 7, 33):
        # Kernels may sum in another order for another batch: equal to float32 rounding.
        assert float((run(batch) - whole).abs().max() / whole.abs().max()) < 5e-5


def _gaussian_error(solver: str, num_steps: int) -> float:
    # Data ~ Normal(0, s^2): D(x; sigma) = x s^2 / (s^2 + sigma^2), and the exact solution of the
    # ODE keeps x / sqrt(s^2 + sigma^2) constant, so x(0) = x(T) s / sqrt(s^2 + T^2).
    s, top = 0.5, 4.0
    sigmas = torch.linspace(top, 0.0, num_steps + 1, dtype=torch.float64)
    noise = torch.tensor([1.0, -2.0], dtype=torch.float64)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return x * sigma / (s**2 + sigma**2)

    found = solve_edm(velocity, noise, sigmas, solver=solver)
    exact = noise * top * s / (s**2 + top**2) ** 0.5
    return float((found - exact).abs().max())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver: str, order: int) -> None:
    errors = [_gaussian_error(solver, n) for n in (64, 128, 256)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.15)


def test_guidance_one_never_calls_the_guide() -> None:
    def model(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        return 0.5 * x

    def guide(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        raise AssertionError("called")

    noise = torch.ones(1, 1, 2, 2)
    found = sample(model, noise, guide=guide, guidance=1.0, num_steps=2)
    assert torch.equal(found, sample(model, noise, num_steps=2))


def test_refusals() -> None:
    def model(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        return x

    noise = torch.zeros(1, 1, 2, 2)
    with pytest.raises(UnknownNameError, match="unknown solver 'huen'; did you mean 'heun'"):
        sample(model, noise, solver="huen")
    with pytest.raises(ConfigError, match="num_steps >= 2 .* got 1"):
        sample(model, noise, num_steps=1)
    with pytest.raises(ConfigError, match="needs a guide"):
        sample(model, noise, guidance=2.0)
    with pytest.raises(ConfigError, match="pass draw"):
        sample(model, noise, churn=Churn(amount=1.0), num_steps=2)
    with pytest.raises(ConfigError, match="sigma_min < sigma_max"):
        sample(model, noise, sigma_min=1.0, sigma_max=0.5)
