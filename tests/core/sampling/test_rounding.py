"""Whole numbers with a derivative: values and derivatives by hand."""

from __future__ import annotations

import torch

from merge_rl.core.sampling.sampler import rounded_down, signed_levels, unit_levels


def test_values_are_those_of_bytes() -> None:
    x = torch.linspace(-1.3, 1.3, 100_001)
    expected = (x * 127.5 + 128).clip(0, 255).to(torch.uint8)
    with_gradient = signed_levels(x.clone().requires_grad_(True))
    assert torch.equal(with_gradient.detach(), expected.float())
    assert torch.equal(signed_levels(x), expected.float())


def test_derivatives_pass_the_rounding_and_stop_at_the_ends() -> None:
    x = torch.tensor([-1.5, -0.301, 0.2, 1.5], requires_grad=True)
    (slope,) = torch.autograd.grad(signed_levels(x).sum(), x)
    assert slope.tolist() == [0.0, 127.5, 127.5, 0.0]
    y = torch.tensor([-0.1, 0.301, 1.2], requires_grad=True)
    (slope,) = torch.autograd.grad((unit_levels(y) * torch.tensor([1.0, 2.0, 3.0])).sum(), y)
    assert slope.tolist() == [0.0, 510.0, 0.0]


def test_the_difference_to_the_floor_is_exact() -> None:
    x = (torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 255).requires_grad_(True)
    assert torch.equal(rounded_down(x).detach(), x.detach().floor())
