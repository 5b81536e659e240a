"""Sampling with denoisers: the official EDM sampler's runs, batches, refusals, failures."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from merge_rl.config.sampler import FIXED_SOLVERS, SDE_SOLVERS
from merge_rl.core.sampling.compatibility import count_network_calls
from merge_rl.core.sampling.edm import Churn, edm_noise_levels
from merge_rl.core.sampling.sampler import sample
from merge_rl.errors import ConfigError, NonFiniteSamplesError, UnknownNameError
from merge_rl.models.edm2 import EDM2
from merge_rl.rng import ImageStreams

CASES = json.loads((Path(__file__).parents[2] / "golden/edm2/sampler/cases.json").read_text())[
    "cases"
]


@functools.cache
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


def equals_elsewhere(found: Tensor, recorded: Tensor) -> bool:
    """Whether normal noise is that of the same stream, recorded with other instructions.

    torch makes pairs r cos(a), r sin(a), 8 places apart in each 16 values, of the same bits on
    every processor: r = sqrt(-2 log u), a = 2 pi v. Instruction sets round them differently. With
    u = eps / 2 the unit of rounding, two of them are apart by at most, in units of eps r:
    9.5 by the angle, up to 2 pi and off by 3 u in total (the constant, and two products);
    2 by the logarithms, good to 2 ulp, of which the root takes half; 1 by the roots;
    2 by sine and cosine, good to 1 ulp; 1 by the last products: less than 16.
    """
    pairs = recorded.double().reshape(-1, 2, 8)
    radius = pairs.square().sum(1, keepdim=True).sqrt()
    difference = (found.double().reshape(-1, 2, 8) - pairs).abs()
    return bool((difference <= 16 * torch.finfo(torch.float32).eps * radius).all())


def test_noise_of_image_seeds_equals_the_official_order(golden: Path) -> None:
    data = load_file(golden / "edm2/sampler/per_seed_noise_cpu.safetensors")
    seeds = data["seeds"].tolist()
    small, large = ImageStreams(seeds), ImageStreams(seeds)
    assert equals_elsewhere(small.randn((4, 8, 8)), data["noise_4x8x8"])
    assert torch.equal(small.randint(10), data["labels_10_after_4x8x8"])
    assert equals_elsewhere(small.randn((4, 8, 8)), data["churn1_4x8x8"])
    assert equals_elsewhere(small.randn((4, 8, 8)), data["churn2_4x8x8"])
    assert equals_elsewhere(large.randn((3, 16, 16)), data["noise_3x16x16"])
    assert torch.equal(large.randint(1000), data["labels_1000_after_3x16x16"])
    # In one process an image's draws have the same bits, alone and among others.
    again, alone = ImageStreams(seeds), torch.Generator().manual_seed(seeds[-1])
    assert torch.equal(again.randn((4, 8, 8))[-1], torch.randn(4, 8, 8, generator=alone))
    assert int(again.randint(10)[-1]) == int(torch.randint(10, [], generator=alone))
    assert torch.equal(again.randn((4, 8, 8))[-1], torch.randn(4, 8, 8, generator=alone))


def test_samples_do_not_depend_on_the_batch_size(golden: Path) -> None:
    model = _net(golden, "cond")

    def run(batch: int) -> Tensor:
        parts = []
        for start in range(0, 12, batch):
            streams = ImageStreams(range(start, min(start + batch, 12)))
            noise = streams.randn((4, 8, 8))
            parts.append(sample(model, noise, streams.randint(10), num_steps=4))
        return torch.cat(parts)

    whole = run(12)
    for batch in (1, 5, 11):
        # Kernels may sum in another order for another batch: equal to float32 rounding.
        assert float((run(batch) - whole).abs().max() / whole.abs().max()) < 5e-5


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
    with pytest.raises(ConfigError, match="num_steps >= 1, got 0"):
        sample(model, noise, num_steps=0)
    for solver in ("dopri5", "sde-euler"):
        with pytest.raises(ConfigError, match="churn is for the fixed-step ODE solvers"):
            sample(model, noise, solver=solver, churn=Churn(amount=1.0))
    with pytest.raises(ConfigError, match="'linear' belongs to paths; networks that denoise"):
        sample(model, noise, solver="sde-euler", diffusion="linear")
    with pytest.raises(ConfigError, match="expected 1 labels, one for each image, found 2"):
        sample(model, noise, torch.tensor([0, 1]))


class Classes:
    """A denoiser of 3 classes; from sigma = 5 downwards image 1 of every batch breaks."""

    label_dim = 3

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        out = x / (1 + sigma**2)
        if float(sigma) < 5:
            out[1] = torch.inf
        return out


@pytest.mark.parametrize("odd", [-1, 3])
def test_labels_out_of_range(odd: int) -> None:
    with pytest.raises(ConfigError, match=rf"expected labels in 0\.\.2, found {odd}"):
        sample(Classes(), torch.zeros(2, 1, 2, 2), torch.tensor([0, odd]))


def test_the_step_that_breaks_is_named(generator: torch.Generator) -> None:
    noise, labels = torch.randn(3, 1, 2, 2, generator=generator), torch.tensor([0, 1, 2])
    levels = edm_noise_levels(8)
    # Heun's second call already looks at the level a step leads to.
    step = int((levels < 5).nonzero()[0])
    broken = sample(Classes(), noise, labels, num_steps=8)
    assert broken.isfinite().flatten(1).all(1).tolist() == [True, False, True]
    for solver, after in (("heun", step), ("euler", step + 1), ("sde-euler", step + 1)):
        message = (
            rf"after step {after} of 8: the norm of image 1 of the batch went from .* to (inf|nan)"
        )
        with pytest.raises(NonFiniteSamplesError, match=message):
            sample(Classes(), noise, labels, num_steps=8, solver=solver, check_finite=True)
    with pytest.raises(NonFiniteSamplesError, match="starting noise of image 2 of the batch is"):
        sample(lambda x, s, c=None, /: x, noise / torch.tensor([1, 1, 0])[:, None, None, None],
               check_finite=True)  # fmt: skip


def test_an_sde_makes_an_image_of_its_noise_alone(golden: Path) -> None:
    model = _net(golden, "cond")
    noise, labels = ImageStreams(range(6)).randn((4, 8, 8)), torch.arange(6)

    def run(rows: slice, **kwargs: Any) -> Tensor:
        return sample(model, noise[rows], labels[rows], num_steps=4, solver="sde-euler", **kwargs)

    whole = run(slice(0, 6))
    for rows in (slice(0, 2), slice(2, 6), slice(5, 6)):
        assert float((run(rows) - whole[rows]).abs().max() / whole.abs().max()) < 5e-5
    assert torch.equal(run(slice(0, 6)), whole)
    # Without diffusion, the steps are those of the Euler ODE.
    still = run(slice(0, 6), diffusion_norm=0.0)
    ode = sample(model, noise, labels, num_steps=4, solver="euler")
    torch.testing.assert_close(still, ode, rtol=1e-4, atol=1e-4)
    assert float((whole - ode).abs().max()) > 0.1


def test_network_calls_are_counted() -> None:
    calls: list[float] = []

    def model(x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        calls.append(float(sigma))
        return x / (1 + sigma**2)

    for solver in (*FIXED_SOLVERS, *SDE_SOLVERS):
        calls.clear()
        sample(model, torch.ones(1, 1, 2, 2), num_steps=5, solver=solver)
        assert len(calls) == count_network_calls(solver, 5)
    with pytest.raises(ConfigError, match="dopri5 chooses its own steps"):
        count_network_calls("dopri5", 5)


def test_adaptive_sampling_of_a_denoiser() -> None:
    # Unit normal data: the exact end of the ODE is noise * 80 / sqrt(1 + 80^2).
    def model(x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        return x / (1 + sigma**2)

    noise = ImageStreams([3]).randn((1, 4, 4))
    found = sample(model, noise, solver="dopri5", rtol=1e-5)
    torch.testing.assert_close(found, noise * 80 / (1 + 80**2) ** 0.5, rtol=1e-3, atol=1e-3)
