"""Sampler settings on their way: into a rollout, into the record of a score, from ODE to SDE."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_rl.config.sampler import SamplerConfig, sde_counterpart
from merge_rl.core.sampling.sampler import sample_with
from merge_rl.errors import ConfigError, NonFiniteSamplesError
from merge_rl.interfaces import Denoiser
from merge_rl.workflows.evaluate.features import sampler_summary
from merge_rl.workflows.rollout.rollout import Rollout

SHAPE = (1, 4, 4)
SEEDS = [5, 0, 12, 7, 1, 9, 3]
LABELS = torch.tensor([0, 2, 1, 1, 0, 2, 2])


class Pull:
    """v(x, t, label) = label - x, of 3 classes and a null class: pointwise, exact in any batch."""

    prediction, label_dim, null_label = "velocity", 3, 3

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None = None, /) -> Tensor:
        assert labels is not None
        return labels.float()[:, None, None, None] - x


class Keep:
    """D(x; sigma) = x / (1 + sigma^2), the denoiser of unit normal data."""

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        return x / (1 + sigma**2)


class Bytes:
    def decode(self, latents: Tensor) -> Tensor:
        return (latents * 20 + 100).clip(0, 255).to(torch.uint8)


class Pixels:
    name, dim = "pixels", 16

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1).float()


def build(model: Denoiser, batch: int = 3, workers: int = 1, **settings: Any) -> Rollout:
    return Rollout(
        model, SHAPE, sampler=SamplerConfig(**settings), autoencoder=Bytes(), extractor=Pixels(),
        batch=batch, workers=workers,
    )  # fmt: skip


@pytest.mark.parametrize("solver", ["heun3", "sde-euler", "sde-heun"])
@pytest.mark.parametrize("model", [Pull(), Keep()], ids=["path", "denoiser"])
def test_the_batch_and_the_threads_change_nothing(model: Denoiser, solver: str) -> None:
    settings: dict[str, Any] = {"solver": solver, "num_steps": 6}
    whole = build(model, batch=7, **settings)
    noise = whole.noise(SEEDS)
    expected = whole.images(noise, LABELS)
    assert len(torch.unique(expected.flatten(1), dim=0)) == 7
    for batch, workers in ((1, 1), (2, 1), (2, 2), (3, 2)):
        found = build(model, batch=batch, workers=workers, **settings)
        assert torch.equal(found.images(noise, LABELS), expected)
    order = torch.tensor([6, 2, 0, 5, 1, 4, 3])
    assert torch.equal(whole.images(noise[order], LABELS[order]), expected[order])


def test_all_settings_reach_the_sampler() -> None:
    settings = SamplerConfig(
        solver="sde-euler", num_steps=5, path="gvp", diffusion="constant", diffusion_norm=0.3,
        last_step="tweedie", last_step_size=0.1, guidance=2.0, guidance_channels=None,
        low_memory=True,
    )  # fmt: skip
    rollout = build(Pull(), batch=7)
    noise = rollout.noise(SEEDS)
    plain = rollout.latents(noise, LABELS)
    other = rollout.with_sampler(settings)
    expected = sample_with(settings, Pull(), noise, LABELS)
    assert torch.equal(other.latents(noise, LABELS), expected)
    assert not torch.equal(expected, plain)
    # The first one is left as it was.
    assert torch.equal(rollout.latents(noise, LABELS), plain)
    assert (rollout.sampler, other.sampler) == (SamplerConfig(path="linear"), settings)


def test_what_does_not_fit_the_network_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="guidance 2 needs a guide network"):
        build(Keep(), guidance=2.0)
    with pytest.raises(ConfigError, match="num_steps >= 2 for EDM noise levels, got 1"):
        build(Keep(), num_steps=1)
    levels: list[dict[str, Any]] = [
        {"sigma_min": 1.0, "sigma_max": 0.5}, {"sigma_max": math.inf}, {"rho": math.inf},
    ]  # fmt: skip
    for odd in levels:
        with pytest.raises(ConfigError, match="need 0 < sigma_min < sigma_max and rho > 0, both f"):
            build(Keep(), **odd)
    with pytest.raises(ConfigError, match="'sbdm' is infinite at t = 0 on the linear path"):
        build(Pull(), solver="sde-euler", diffusion="sbdm")
    with pytest.raises(ConfigError, match="compile is for accelerators"):
        build(Pull(), compile=True)
    assert build(Pull(), num_steps=1).sampler.num_steps == 1
    with pytest.raises(ConfigError, match="need num_steps >= 2 for an SDE"):
        build(Pull()).with_sampler(SamplerConfig(solver="sde-heun", num_steps=1))


def test_images_that_are_not_finite_are_not_shown() -> None:
    class Broken(Pull):
        def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None = None, /) -> Tensor:
            return super().__call__(x, t, labels) / (0.5 - t)

    rollout = build(Broken(), batch=7, solver="euler", num_steps=4)
    with pytest.raises(NonFiniteSamplesError, match="after step 3 of 4: the norm of image 0"):
        rollout.images(rollout.noise(SEEDS), LABELS)
    assert bool(rollout.features(rollout.noise(SEEDS), LABELS).isnan().all())


def test_the_record_of_a_score_names_what_it_depends_on() -> None:
    edm = {"solver": "heun", "num_steps": 32, "guidance": 1.0, "sigma_min": 0.002,
           "sigma_max": 80.0, "rho": 7.0}  # fmt: skip
    assert sampler_summary(SamplerConfig()) == edm
    path = {"solver": "heun", "num_steps": 32, "guidance": 1.0, "path": "linear"}
    assert sampler_summary(SamplerConfig(path="linear"), "velocity") == path
    sde = SamplerConfig(solver="sde-euler", guidance=1.5, precision="tf32", path="linear")
    noise = {"solver": "sde-euler", "guidance": 1.5, "precision": "tf32", "diffusion": "sigma",
             "diffusion_norm": 1.0}  # fmt: skip
    assert sampler_summary(sde) == {**edm, **noise}
    last = {"last_step": "mean", "last_step_size": 0.04, "guidance_channels": 3}
    assert sampler_summary(sde, "velocity") == {**path, **noise, **last}
    adaptive = sampler_summary(SamplerConfig(solver="dopri5", path="linear"), "velocity")
    assert adaptive == {**path, "solver": "dopri5", "rtol": 1e-3, "atol": 1e-6}


def test_the_sde_beside_an_ode() -> None:
    ode = SamplerConfig(num_steps=8, sde_num_steps=50, path="gvp", last_step_size=0.1)
    sde = sde_counterpart(ode)
    assert (sde.solver, sde.num_steps, sde.path, sde.last_step_size) == (
        "sde-euler",
        50,
        "gvp",
        0.1,
    )
    assert (ode.is_sde, sde.is_sde) == (False, True)
    assert sde_counterpart(sde) == sde
    assert sde_counterpart(ode, num_steps=20).num_steps == 20
    # What the official evaluation uses when nothing is said: 250 intervals, 249 of them noisy.
    assert sde_counterpart(SamplerConfig()) == SamplerConfig(
        solver="sde-euler", num_steps=250, diffusion="sigma", diffusion_norm=1.0, last_step="mean",
        last_step_size=0.04,
    )  # fmt: skip
