"""The product with a cotangent, through which gradients are taken back; layers without draws."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from merge_rl.core.network import Undrawn, against

PROGRAM = """
import sys, torch
from merge_rl.core.network import against
x = torch.ones(3, requires_grad=True)
against(2 * x, torch.arange(3.0)).backward()
assert x.grad.tolist() == [0, 2, 4]
print("sympy" in sys.modules)
"""


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_gradient_is_the_cotangent_to_the_bit(kind: torch.dtype) -> None:
    # 3 · 30,000 and its sum are beyond float16: the scalar is infinite, the gradient is not.
    made = torch.tensor([[3.0, -0.5, 1e-7], [0.0, 2.0, 5.0]], dtype=kind).requires_grad_(True)
    cotangent = torch.tensor([[3e4, -0.0, 1e-7], [7.0, torch.inf, 0.1]], dtype=kind)
    (found,) = torch.autograd.grad(against(made, cotangent), made)
    (expected,) = torch.autograd.grad(made, made, cotangent)
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16}[kind.itemsize]
    assert torch.equal(found.view(whole), expected.view(whole))


def test_it_loads_no_symbolic_shapes() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert ended.stdout == "False\n", ended.stderr


def test_layers_that_are_to_be_loaded_draw_nothing() -> None:
    before = torch.get_rng_state()
    with Undrawn():
        nn.init.xavier_uniform_(torch.empty(2, 3))
        assert torch.randn(2, 3).shape == (2, 3)
        assert torch.rand(4).shape == (4,)
        layers = nn.Linear(3, 4), nn.Conv2d(1, 2, 3), nn.Embedding(5, 2), nn.BatchNorm2d(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert layers[-1].weight.tolist() == [1, 1, 1]  # what is no draw is set
    nn.Linear(3, 4)
    assert not torch.equal(torch.get_rng_state(), before)
