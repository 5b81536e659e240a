"""The pool: subsets with the classes' shares, moments of replaced rows, columns, the gap."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from merge_rl.core.distances.statistics import feature_stats
from merge_rl.errors import ConfigError, StatisticsError
from merge_rl.rng import draw_subset
from merge_rl.workflows.rewards.frechet import Pool, pool_gap

pytestmark = pytest.mark.numerics

DIM = 6
CLASSES = 4


def draw_features(count: int, generator: torch.Generator, shift: float = 0.0) -> Tensor:
    mixing = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(9))
    return torch.randn(count, DIM, generator=generator) @ mixing + 3 + shift


@pytest.fixture
def pool(generator: torch.Generator) -> Pool:
    return Pool.of(draw_features(120, generator, shift=0.4), torch.arange(120) % CLASSES)


def counts(labels: Tensor, rows: Tensor) -> list[int]:
    return torch.bincount(labels[rows], minlength=int(labels.max()) + 1).tolist()


# ------------------------------------------------------------------------------------- subsets


@pytest.mark.parametrize("seed", range(4))
def test_balanced_classes_stay_balanced(seed: int) -> None:
    labels = torch.arange(200) % 10
    rows = draw_subset(labels, 50, torch.Generator().manual_seed(seed))
    assert counts(labels, rows) == [5] * 10
    # 37 rows of ten equal classes: three or four of each.
    rows = draw_subset(labels, 37, torch.Generator().manual_seed(seed))
    assert sorted(counts(labels, rows)) == [3] * 3 + [4] * 7


@pytest.mark.parametrize("size", [1, 7, 50, 333, 1000])
def test_every_class_keeps_its_share(size: int) -> None:
    # One class of 900 and ten of 10: rounding each small class on its own could add up to ten rows
    # that the large one would have to give.
    sizes = torch.tensor([900] + [10] * 10)
    labels = torch.arange(11).repeat_interleave(sizes)
    labels = labels[torch.randperm(1000, generator=torch.Generator().manual_seed(5))]
    for seed in range(30):
        rows = draw_subset(labels, size, torch.Generator().manual_seed(seed))
        assert len(rows) == size
        for found, total in zip(counts(labels, rows), sizes.tolist(), strict=True):
            share = total * size / 1000
            assert math.floor(share) <= found <= math.ceil(share)


def test_rows_are_sorted_unique_and_repeatable() -> None:
    labels = torch.tensor([2, 0, 0, 5, 2, 0, 0, 2, 0])  # labels need not be 0..K-1
    for size in range(1, 10):
        rows = draw_subset(labels, size, torch.Generator().manual_seed(size))
        assert rows.dtype == torch.int64
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert 0 <= int(rows[0]) <= int(rows[-1]) < 9
        again = draw_subset(labels, size, torch.Generator().manual_seed(size))
        assert torch.equal(rows, again)
    assert draw_subset(labels, 9, torch.Generator()).tolist() == list(range(9))


def test_every_row_is_equally_likely() -> None:
    # 2,000 draws of 3 out of 12: each row is in 500 of them, standard deviation 19.4; the largest
    # of twelve deviations stays within 5 of these.
    labels = torch.tensor([0] * 7 + [1] * 4 + [2])
    generator = torch.Generator().manual_seed(1)
    hits = torch.zeros(12)
    for _ in range(2000):
        hits[draw_subset(labels, 3, generator)] += 1
    assert float((hits - 500).abs().max()) < 97


@pytest.mark.parametrize("size", [0, -1, 10])
def test_subset_sizes_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"expected a subset of 1\.\.9 rows, got {size}"):
        draw_subset(torch.zeros(9, dtype=torch.int64), size, torch.Generator())


# ---------------------------------------------------------------------------------------- pool


@pytest.mark.parametrize("size", [1, 30, 119, 120])
def test_replaced_moments_equal_recomputation(
    size: int, pool: Pool, generator: torch.Generator
) -> None:
    rows = torch.randperm(120, generator=generator)[:size]
    before = (pool.features.clone(), pool.stats.mean.clone(), pool.stats.cov.clone())
    fresh = draw_features(size, generator, shift=-2.0)
    replaced = pool.replaced(rows, fresh)
    expected = pool.features.clone()
    expected[rows] = fresh
    assert torch.equal(replaced.features, expected)
    assert replaced.labels is pool.labels
    assert len(replaced) == replaced.stats.count == 120
    exact = feature_stats(expected)
    torch.testing.assert_close(replaced.stats.mean, exact.mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(replaced.stats.cov, exact.cov, rtol=0, atol=1e-9)
    # The pool it was made from is as it was.
    found = (pool.features, pool.stats.mean, pool.stats.cov)
    assert all(torch.equal(a, b) for a, b in zip(before, found, strict=True))


def test_a_long_chain_of_updates_stays_exact(pool: Pool, generator: torch.Generator) -> None:
    for start in range(0, 1200, 30):
        rows = (torch.arange(30) + start) % 120
        pool = pool.replaced(rows, draw_features(30, generator))
    exact = feature_stats(pool.features)
    torch.testing.assert_close(pool.stats.mean, exact.mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(pool.stats.cov, exact.cov, rtol=0, atol=1e-9)


def test_a_pool_of_failed_images_is_refused(generator: torch.Generator) -> None:
    features = draw_features(5, generator)
    features[3, 1] = math.nan
    with pytest.raises(StatisticsError, match="1 of 5 rows with NaN or infinity"):
        Pool.of(features, torch.zeros(5, dtype=torch.int64))


def test_columns_are_a_pool_of_their_own(pool: Pool) -> None:
    part = pool.columns(2, 5)
    alone = Pool.of(pool.features[:, 2:5], pool.labels)
    assert torch.equal(part.features, alone.features)
    assert part.labels is pool.labels
    torch.testing.assert_close(part.stats.mean, alone.stats.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(part.stats.cov, alone.stats.cov, rtol=1e-9, atol=1e-12)
    assert pool.columns(0, DIM) is pool


def test_pool_gap_by_hand() -> None:
    # A twentieth of the pool renewed took the distance from 8 to 8.1: 1.25 % for 5 % of the rows,
    # so a wholly renewed pool would be about 25 % worse.
    assert pool_gap(8.0, 8.1, 0.05) == pytest.approx(0.25)
    assert pool_gap(8.0, 7.9, 0.05) == pytest.approx(-0.25)
    assert pool_gap(8.0, 8.0, 0.5) == 0
    # An unbiased kernel distance may be 0 or less: nothing is relative to that.
    assert pool_gap(0.0, 0.3, 0.5) == pool_gap(-0.1, 0.3, 0.5) == 0
