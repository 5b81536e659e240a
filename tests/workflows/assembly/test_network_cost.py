"""FLOPs and peak memory of forward passes that never run, by hand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import merge_rl as mrl
from merge_rl.workflows.assembly.costs import Cost, LiveBytes, forward_cost, weight_bytes
from merge_rl.workflows.assembly.parts import blank_network


class Chain(nn.Module):
    """x (B, 8) -> 16 -> 4, and a table of 10 numbers that it makes in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        table = torch.zeros(10)
        hidden = self.first(x)
        out: Tensor = self.second(hidden)
        return out + table.sum()


def test_a_chain_by_hand() -> None:
    def inputs(batch: int) -> Iterable[Tensor]:
        return [torch.empty(batch, 8)]

    cost = forward_cost(Chain, inputs, "cpu")
    assert cost.flops == 2 * (8 * 16 + 16 * 4)
    # At most alive at once: the table (10), hidden (16 B), out (4 B), the sum (1), and the result
    # (4 B) while hidden and out are still referred to: 4 bytes each.
    assert cost.per_image == 4 * (16 + 4 + 4)
    assert cost.fixed == 4 * (10 + 1)
    assert cost.peak(100) == cost.fixed + 100 * 96


def test_storages_are_counted_once_and_freed() -> None:
    with torch.device("meta"), LiveBytes() as memory:
        x = torch.empty(1000)
        y = x.view(10, 100)
        assert memory.live == 4000
        del x
        assert memory.live == 4000  # the view holds it
        del y
        assert memory.live == 0
        torch.empty(250)
    assert memory.peak == 4000


class Halved(nn.Module):
    """Computes in half precision where `half_on` says so, as EDM2 does."""

    half_on: tuple[str, ...] = ("cuda",)

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(4, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.float16 if x.device.type in self.half_on else torch.float32
        return F.conv2d(x.to(dtype), self.kernel.to(dtype), padding=1)


@pytest.mark.parametrize(("device", "size"), [("cpu", 4), ("cuda", 2)])
def test_half_precision_is_that_of_the_device(device: str, size: int) -> None:
    def inputs(batch: int) -> Iterable[Tensor]:
        return [torch.empty(batch, 1, 6, 6)]

    cost = forward_cost(Halved, inputs, device)
    assert cost.flops == 2 * 36 * 4 * 9
    cast = 36 if size == 2 else 0  # the input in half precision; float32 is taken as it is
    assert cost.per_image == size * (36 * 4 + cast)


def test_bytes_of_weights() -> None:
    assert weight_bytes(Chain()) == 4 * (8 * 16 + 16 * 4)
    assert weight_bytes(Chain().half()) == 2 * (8 * 16 + 16 * 4)
    assert weight_bytes(object()) == 0
    assert Cost(1.0, 5, 2.5).peak(2) == 10


def test_a_network_for_weights_that_come_draws_none(tiny: Path) -> None:
    checkpoints = mrl.open_checkpoints(tiny)
    before = torch.get_rng_state()
    blank_network(checkpoints, "cpu")
    assert torch.equal(torch.get_rng_state(), before)
    blank_network(checkpoints, "cpu", drawn=True)
    assert not torch.equal(torch.get_rng_state(), before)
