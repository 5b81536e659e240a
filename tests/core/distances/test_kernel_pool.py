"""Kernel sums of a pool: updated against recomputed, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from merge_rl.core.distances.kernels import (
    Kernel,
    KernelPool,
    KernelReference,
    RBFKernel,
    cubic_kernel,
    kernel_distance,
)
from merge_rl.errors import StatisticsError, TooFewSamplesError

KERNELS = [cubic_kernel, RBFKernel(10.0)]


def close(value: float, expected: float) -> bool:
    return value == pytest.approx(expected, rel=1e-9, abs=1e-12)


def replaced(features: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    after = features.clone()
    after[rows] = new
    return after


def test_replaced_row_by_hand() -> None:
    # k = (xy + 1)³ on a line. Pool 0, 1, −1, reference 0, 1. Within the reference k(0, 1) = 1.
    # Within the pool: k(0, ±1) = 1, k(1, −1) = 0, mean 2/3; across: 1, 1; 1, 8; 1, 0, mean 2.
    reference = KernelReference.of(torch.tensor([[0.0], [1.0]]))
    pool = reference.pool(torch.tensor([[0.0], [1.0], [-1.0]]))
    assert pool.within.tolist() == [2, 1, 1]
    assert pool.across.tolist() == [2, 9, 1]
    assert close(pool.distance, 2 / 3 + 1 - 4)
    # −1 turned into 2: k(0, 2) = 1, k(1, 2) = 27, mean 29/3; across 1, 1; 1, 8; 1, 27, mean 39/6.
    rows, new = torch.tensor([2]), torch.tensor([[2.0]])
    assert close(pool.distance_with(rows, new), 29 / 3 + 1 - 13)
    after = pool.replaced(rows, new)
    assert after.within.tolist() == [2, 28, 28]
    assert after.across.tolist() == [2, 9, 28]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("count", [0, 1, 25, 500])
def test_replaced_rows_equal_recomputation(
    features: dict[str, Tensor], kernel: Kernel, count: int, generator: torch.Generator
) -> None:
    real, pool_features, fresh = features["a"], features["b"], features["d"]
    pool = KernelReference.of(real, kernel).pool(pool_features)
    assert close(pool.distance, kernel_distance(pool_features, real, kernel))
    rows = torch.randperm(500, generator=generator)[:count]
    new = fresh[:count]
    expected = kernel_distance(replaced(pool_features, rows, new), real, kernel)
    assert close(pool.distance_with(rows, new), expected)
    assert close(pool.replaced(rows, new).distance, expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_chain_of_updates_does_not_drift(
    features: dict[str, Tensor], kernel: Kernel, generator: torch.Generator
) -> None:
    reference = KernelReference.of(features["c"], kernel)
    now = features["b"][:100]
    pool = reference.pool(now)
    for _ in range(60):
        rows = torch.randperm(100, generator=generator)[:10]
        new = features["a"][torch.randperm(600, generator=generator)[:10]]
        pool, now = pool.replaced(rows, new), replaced(now, rows, new)
    fresh = reference.pool(now)
    assert torch.equal(pool.features, now)
    torch.testing.assert_close(pool.within, fresh.within, rtol=1e-12, atol=0)
    torch.testing.assert_close(pool.across, fresh.across, rtol=1e-12, atol=0)
    assert close(pool.distance, kernel_distance(now, features["c"], kernel))


def test_inputs_are_not_altered(features: dict[str, Tensor]) -> None:
    # float64 throughout, where a conversion makes no copy.
    pool = KernelReference.of(features["c"].double()).pool(features["b"][:30].double())
    new, rows = features["a"][:4].double(), torch.tensor([7, 2, 0, 29])
    tensors = [pool.features, pool.within, pool.across, pool.reference.features, new, rows]
    before = [tensor.clone() for tensor in tensors]
    pool.distance_with(rows, new)
    pool.replaced(rows, new)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


def test_a_pool_is_restored_from_its_tensors(features: dict[str, Tensor]) -> None:
    pool = KernelReference.of(features["c"]).pool(features["b"][:30])
    pool = pool.replaced(torch.tensor([3, 5]), features["a"][:2])
    again = KernelPool(pool.reference, pool.features, pool.within, pool.across)
    rows, new = torch.tensor([5, 8]), features["a"][2:4]
    assert again.distance == pool.distance
    assert again.distance_with(rows, new) == pool.distance_with(rows, new)


def test_sums_are_those_of_the_rows_as_kept(features: dict[str, Tensor]) -> None:
    # New rows in float64 go into a float32 pool: their lost digits must not stay in the sums.
    pool = KernelReference.of(features["c"]).pool(features["b"][:30])
    rows, new = torch.arange(20), features["a"][:20].double() * (1 + 1e-6)
    after = pool.replaced(rows, new)
    assert after.features.dtype == torch.float32
    assert close(after.distance, kernel_distance(after.features, features["c"]))
    assert close(pool.distance_with(rows, new), after.distance)


def test_what_does_not_fit_is_refused() -> None:
    reference = KernelReference.of(torch.eye(4, 3))
    pool = reference.pool(torch.ones(5, 3))
    with pytest.raises(TooFewSamplesError, match="at least 2 feature rows, got 1"):
        KernelReference.of(torch.ones(1, 3))
    with pytest.raises(TooFewSamplesError, match="at least 2 feature rows, got 1"):
        reference.pool(torch.ones(1, 3))
    with pytest.raises(StatisticsError, match="got 2 and 3"):
        reference.pool(torch.ones(5, 2))
    for call in (pool.distance_with, pool.replaced):
        with pytest.raises(StatisticsError, match=r"features \(2, 3\), got shape \(1, 3\)"):
            call(torch.tensor([0, 1]), torch.ones(1, 3))
        with pytest.raises(StatisticsError, match="1 of 1 rows with NaN"):
            call(torch.tensor([0]), torch.full((1, 3), torch.nan))
        with pytest.raises(StatisticsError, match="replaced once, got repeated"):
            call(torch.tensor([1, 1]), torch.ones(2, 3))
