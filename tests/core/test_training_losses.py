"""The families' training losses: values by hand, and where their minimum lies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from merge_rl.core.sampling.paths import make_path
from merge_rl.core.step_policy import (
    denoising_loss,
    log_normal_levels,
    uniform_times,
    velocity_loss,
)

DATA = torch.tensor([[[[2.0, -1.0]]], [[[0.5, 3.0]]]])
NOISE = torch.tensor([[[[1.0, 0.5]]], [[[-2.0, 0.0]]]])


@pytest.mark.parametrize("name", ["linear", "gvp", "vp"])
def test_a_velocity_that_is_right_costs_nothing(name: str) -> None:
    path, times = make_path(name), torch.tensor([0.25, 0.75])

    def exact(x: Tensor, t: Tensor, _labels: Tensor | None = None, /) -> Tensor:
        at = t.reshape(-1, 1, 1, 1)
        torch.testing.assert_close(x, path.alpha(at) * DATA + path.sigma(at) * NOISE)
        return path.d_alpha(at) * DATA + path.d_sigma(at) * NOISE

    assert float(velocity_loss(exact, path, DATA, None, times, NOISE)) == pytest.approx(0)


def test_velocity_loss_by_hand() -> None:
    # The linear velocity is data - noise: (1, -1.5, 2.5, 3), against 1 everywhere.
    def one(x: Tensor, _t: Tensor, _labels: Tensor | None = None, /) -> Tensor:
        return torch.ones_like(x)

    found = velocity_loss(one, make_path("linear"), DATA, None, torch.tensor([0.1, 0.9]), NOISE)
    assert float(found) == pytest.approx((0 + 2.5**2 + 1.5**2 + 2**2) / 4)


def test_denoising_loss_by_hand() -> None:
    # D = x: the error is sigma noise, and w sigma^2 = (sigma^2 + s^2) / s^2 with s = 0.5.
    def identity(x: Tensor, sigma: Tensor, _labels: Tensor | None = None, /) -> Tensor:
        torch.testing.assert_close(x, DATA + sigma.reshape(-1, 1, 1, 1) * NOISE)
        return x

    sigma = torch.tensor([0.5, 1.0])
    found = denoising_loss(identity, DATA, None, sigma, NOISE, sigma_data=0.5)
    assert float(found) == pytest.approx((2 * (1 + 0.25) + 5 * (4 + 0)) / 4)


def test_levels_and_times() -> None:
    levels = log_normal_levels(torch.tensor([0.0, 1.0]), -0.4, 1.2)
    torch.testing.assert_close(levels, torch.tensor([-0.4, 0.8]).exp())
    times = uniform_times(torch.tensor([0.0, 0.5]), 0.999)
    torch.testing.assert_close(times, torch.tensor([0.0, 0.4995]))
