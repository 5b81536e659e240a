"""Out of memory halves what is made at once, loses nothing and changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from merge_rl.config.sampler import SamplerConfig
from merge_rl.errors import OutOfMemoryError
from merge_rl.interfaces import Denoiser
from merge_rl.workflows.rollout.execution import BatchHalving, is_out_of_memory
from merge_rl.workflows.rollout.rollout import Rollout
from tests.workflows.rollout.test_rollout import LABELS, SEEDS, SHAPE, Bytes, KeepNoise, Pixels


class Small:
    """A function, or network, that takes only so many rows."""

    def __init__(self, most: int) -> None:
        self.most, self.sizes = most, list[int]()

    def __call__(
        self, x: Tensor, sigma: Tensor | None = None, _labels: Tensor | None = None
    ) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 2 * x if sigma is None else KeepNoise()(x, sigma)


def test_halves_until_it_fits_and_remembers() -> None:
    told: list[str] = []
    halving, function = BatchHalving(told.append), Small(3)
    rows = torch.arange(20.0).reshape(10, 2)
    assert torch.equal(halving(function, rows), 2 * rows)
    # 10, 5 are too many; 3 fit, so 3 + 3 + 3 + 1; none of it is done twice.
    assert function.sizes == [10, 5, 3, 3, 3, 1]
    assert torch.equal(halving(function, rows), 2 * rows)
    assert function.sizes[6:] == [3, 3, 3, 1]
    assert told == [
        "out of memory with 10 images at once: 5 from now on",
        "out of memory with 5 images at once: 3 from now on",
    ]


def test_one_image_that_is_too_large_is_told() -> None:
    with pytest.raises(OutOfMemoryError, match="out of memory with one image at a time"):
        BatchHalving()(Small(0), torch.zeros(5, 1))


def test_other_errors_pass() -> None:
    def broken(_x: Tensor) -> Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        BatchHalving()(broken, torch.zeros(5, 1))
    alloc = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
    assert is_out_of_memory(RuntimeError(alloc))
    assert not is_out_of_memory(ValueError(alloc))


def test_no_rows_are_rows() -> None:
    assert BatchHalving()(lambda x: 2 * x, torch.zeros(0, 3)).shape == (0, 3)


def build(network: Denoiser, batch: int) -> Rollout:
    return Rollout(
        network, SHAPE, sampler=SamplerConfig(num_steps=3), autoencoder=Bytes(),
        extractor=Pixels(), batch=batch,
    )  # fmt: skip


def test_a_rollout_goes_on_with_equal_results() -> None:
    whole = build(KeepNoise(), 7)
    noise = whole.noise(SEEDS)
    expected = whole.features(noise, LABELS)
    network = Small(2)
    rollout = build(network, 7)
    assert torch.equal(rollout.features(noise, LABELS), expected)
    assert max(network.sizes) == 7
    network.sizes.clear()
    assert torch.equal(rollout.with_extractor(Pixels()).features(noise, LABELS), expected)
    assert max(network.sizes) == 2  # known from then on
