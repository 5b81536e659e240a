"""The extractor of the embedded digits: features by hand, and weights that say for which digits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from merge_rl.features.digits import DigitsNet, load_digits_extractor


@pytest.mark.parametrize("side", [8, 28])
def test_weights_say_for_which_digits(side: int, generator: torch.Generator) -> None:
    made = DigitsNet(side).eval()
    loaded = load_digits_extractor(made.state_dict())
    images = torch.randint(0, 256, (3, 1, side, side), dtype=torch.uint8, generator=generator)
    assert loaded.side == side
    assert torch.equal(loaded(images), made(images))
    assert loaded(images).shape == (3, 64)


@pytest.mark.parametrize("side", [8, 28])
def test_features_are_centred_whitened_and_have_a_derivative(side: int) -> None:
    net = DigitsNet(side).eval()
    net.whitening.copy_(2 * torch.eye(64))
    images = torch.full((1, 1, side, side), 200.0, requires_grad=True)
    net.centre.copy_(net.pooled(images)[0].detach() - 1)
    features: Tensor = net(images)
    torch.testing.assert_close(features, torch.full((1, 64), 2.0))  # (x - (x - 1)) 2
    net.pooled(images).sum().backward()  # type: ignore[no-untyped-call]
    assert images.grad is not None
    assert bool(images.grad.abs().sum() > 0)
