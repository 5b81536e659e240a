"""Feature moments: one pass against merged and updated ones, by hand and against torch.cov."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from merge_rl.core.distances.statistics import (
    BLOCK_ROWS,
    FeatureStats,
    check_moments,
    extend_stats,
    feature_mean,
    feature_stats,
    merge_stats,
    replace_rows,
)
from merge_rl.errors import StatisticsError, TooFewSamplesError


def assert_same(value: FeatureStats, expected: FeatureStats, *, rel: float = 1e-9) -> None:
    assert value.count == expected.count
    for got, want in ((value.mean, expected.mean), (value.cov, expected.cov)):
        assert got.dtype == torch.float64
        assert float((got - want).abs().max()) <= rel * float(want.abs().max())


def test_moments_by_hand() -> None:
    # Rows (1, 2), (3, 2), (5, 8): mean (3, 4), deviations (−2, −2), (0, −2), (2, 4), scatter
    # [[4+0+4, 4+0+8], [·, 4+4+16]] = [[8, 12], [12, 24]], covariance a half of it.
    stats = feature_stats(torch.tensor([[1, 2], [3, 2], [5, 8]]))
    assert (stats.count, stats.dim) == (3, 2)
    assert stats.mean.tolist() == [3, 4]
    assert stats.cov.tolist() == [[4, 6], [6, 12]]
    assert stats.scatter.tolist() == [[8, 12], [12, 24]]


def test_one_row_at_a_time_by_hand() -> None:
    # Those rows again: squares and products of the deviations sum to 8, 24 and 12.
    stats = None
    for row in ([1, 2], [3, 2], [5, 8]):
        stats = extend_stats(stats, torch.tensor([row], dtype=torch.float32))
    expected = torch.tensor([[4.0, 6.0], [6.0, 12.0]], dtype=torch.float64)
    assert stats is not None
    assert_same(stats, FeatureStats(3, torch.tensor([3.0, 4.0], dtype=torch.float64), expected))


def test_blocks_do_not_show(generator: torch.Generator) -> None:
    # Mean 100, std 0.01: float32 raw second moments would lose every digit of the covariance.
    features = 100 + 0.01 * torch.randn(2 * BLOCK_ROWS + 7, 5, generator=generator)
    stats = feature_stats(features)
    torch.testing.assert_close(stats.mean, features.double().mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(stats.cov, torch.cov(features.double().T), rtol=1e-9, atol=1e-15)


def test_means_of_all_dtypes_are_taken_in_float64(generator: torch.Generator) -> None:
    whole = torch.randint(0, 256, (BLOCK_ROWS + 9, 3), generator=generator)
    for features in (whole, whole.to(torch.uint8), whole.half(), whole.double()):
        torch.testing.assert_close(
            feature_mean(features), whole.double().mean(0), rtol=1e-14, atol=0
        )


def test_half_precision_features_are_summed_in_float64(generator: torch.Generator) -> None:
    features = torch.randn(3000, 3, generator=generator).half()
    assert_same(feature_stats(features), feature_stats(features.double()), rel=1e-15)


@pytest.mark.parametrize("sizes", [(2, 3), (2, 40), (40, 2), (1500, 20)])
def test_merged_moments_equal_one_pass(sizes: tuple[int, int], generator: torch.Generator) -> None:
    a, b = (100 + k + 0.01 * torch.randn(n, 5, generator=generator) for k, n in enumerate(sizes))
    stats_a, stats_b = feature_stats(a), feature_stats(b)
    expected = feature_stats(torch.cat([a, b]))
    assert_same(merge_stats(stats_a, stats_b), expected)
    assert_same(merge_stats(stats_b, stats_a), expected)


def test_replaced_row_by_hand() -> None:
    # (1, 2), (3, 2), (5, 8) with the first row turned into (7, 5): mean (5, 5), deviations (2, 0),
    # (−2, −3), (0, 3), scatter [[8, 6], [6, 18]].
    stats = feature_stats(torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 8.0]]))
    updated = replace_rows(stats, torch.tensor([[1.0, 2.0]]), torch.tensor([[7.0, 5.0]]))
    expected = torch.tensor([[4.0, 3.0], [3.0, 9.0]], dtype=torch.float64)
    torch.testing.assert_close(updated.mean, torch.tensor([5.0, 5.0], dtype=torch.float64))
    torch.testing.assert_close(updated.cov, expected)


@pytest.mark.parametrize(
    ("count", "dim", "subset"), [(5000, 512, 25), (30, 40, 1), (30, 4, 30), (50, 6, 0)]
)
def test_replaced_rows_equal_recomputation(
    count: int, dim: int, subset: int, generator: torch.Generator
) -> None:
    features = 3 + torch.logspace(-2, 0, dim) * torch.randn(count, dim, generator=generator)
    rows = torch.randperm(count, generator=generator)[:subset]
    new = 5 + torch.randn(subset, dim, generator=generator)
    after = features.clone()
    after[rows] = new
    updated = replace_rows(feature_stats(features), features[rows], new)
    assert_same(updated, feature_stats(after))


def test_replacing_there_and_back_returns_the_moments(generator: torch.Generator) -> None:
    features = torch.randn(200, 8, generator=generator)
    new = 10 + torch.randn(20, 8, generator=generator)
    stats = feature_stats(features)
    back = replace_rows(replace_rows(stats, features[:20], new), new, features[:20])
    assert_same(back, stats, rel=1e-12)


def test_inputs_are_not_altered(generator: torch.Generator) -> None:
    # float64 throughout, where a conversion makes no copy.
    features = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    new = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    stats = feature_stats(features)
    inputs: list[Tensor] = [features, new, stats.mean, stats.cov]
    before = [x.clone() for x in inputs]
    replace_rows(stats, features[:2], new)
    merge_stats(stats, stats)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_rows_are_refused(count: int) -> None:
    with pytest.raises(TooFewSamplesError, match=f"at least 2 feature rows, got {count}"):
        feature_stats(torch.ones(count, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_features_are_refused(value: float) -> None:
    features = torch.zeros(BLOCK_ROWS + 5, 2)
    features[-1, 1] = value
    with pytest.raises(StatisticsError, match=f"got 1 of {BLOCK_ROWS + 5} rows"):
        feature_stats(features)
    stats = feature_stats(torch.randn(9, 2))
    with pytest.raises(StatisticsError, match="got 1 of 1 rows"):
        replace_rows(stats, features[:1], features[-1:])


@pytest.mark.parametrize("shape", [(6,), (2, 3, 4)])
def test_features_that_are_no_matrix_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(StatisticsError, match="expected features as a tensor, got list"):
        feature_stats([[1.0, 2.0], [3.0, 4.0]])  # type: ignore[arg-type]
    with pytest.raises(StatisticsError, match=r"features \(N, D\), got shape"):
        feature_stats(torch.ones(shape))
    with pytest.raises(StatisticsError, match=r"real numbers, got torch\.complex64"):
        feature_stats(torch.ones(3, 2, dtype=torch.complex64))


@pytest.mark.parametrize(("old", "new"), [((2, 3), (3, 3)), ((2, 4), (2, 4)), ((7, 3), (7, 3))])
def test_rows_that_do_not_fit_are_refused(old: tuple[int, int], new: tuple[int, int]) -> None:
    stats = feature_stats(torch.eye(6, 3))
    with pytest.raises(StatisticsError, match=r"rows \(n, 3\), n <= 6, got shapes"):
        replace_rows(stats, torch.ones(old), torch.ones(new))


def test_moments_that_do_not_fit_are_refused() -> None:
    mean, cov = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    with pytest.raises(StatisticsError, match=r"shapes \(2,\) and \(3, 3\)"):
        FeatureStats(9, mean, torch.eye(3, dtype=torch.float64))
    with pytest.raises(StatisticsError, match=r"got torch\.float64 and torch\.float32"):
        FeatureStats(9, mean, cov.float())
    with pytest.raises(TooFewSamplesError, match="got 0"):
        FeatureStats(0, mean, cov)
    with pytest.raises(TooFewSamplesError, match="got 1"):
        replace_rows(FeatureStats(1, mean, cov), torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(StatisticsError, match="got 2 and 3"):
        merge_stats(FeatureStats(9, mean, cov), feature_stats(torch.eye(6, 3)))


def test_moments_of_samples_pass_the_check(generator: torch.Generator) -> None:
    # Fewer samples than dimensions, a variance of 0, and moments after an update.
    features = torch.randn(5, 8, generator=generator) * torch.tensor([0.0, 1e3] + [1.0] * 6)
    stats = feature_stats(features)
    check_moments(stats)
    check_moments(replace_rows(stats, features[:2], features[2:4]))


def test_moments_of_no_samples_are_refused() -> None:
    mean, cov = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    lopsided = torch.tensor([[4.0, 1.0], [0.0, 4.0]], dtype=torch.float64)
    bad = {
        "at least 2 samples for a distance, got 1": FeatureStats(1, mean, cov),
        "finite moments, got 1 entries": FeatureStats(
            9, mean.index_fill(0, torch.tensor(1), torch.nan), cov
        ),
        "finite moments, got 4 entries": FeatureStats(9, mean, cov * torch.inf),
        "differ by 1 from their mirror image, where the largest is 4": FeatureStats(
            9, mean, lopsided
        ),
        "variances of at least 0, got -1": FeatureStats(9, mean, -cov),
        "at least 1 dimension, got none": FeatureStats(9, mean[:0], cov[:0, :0]),
    }
    for message, stats in bad.items():
        with pytest.raises(StatisticsError, match=message):
            check_moments(stats)
