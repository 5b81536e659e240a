"""Student intervals, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from merge_rl.core.distances.intervals import Interval, improvement, mean_interval
from merge_rl.errors import TooFewSamplesError


def test_interval_by_hand() -> None:
    # Mean 2, s = 1, t_{0.975, 2} = 4.302653 (any table): half width 4.302653 / sqrt(3).
    found = mean_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    half = 4.302653 / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), rel=1e-6)


def test_two_values_are_enough() -> None:
    # Mean 5, s = sqrt(2), t_{0.975, 1} = 12.706205: half width 12.706205 sqrt(2) / sqrt(2).
    found = mean_interval([4.0, 6.0])
    assert (found.low, found.high) == pytest.approx((5 - 12.706205, 5 + 12.706205), rel=1e-6)


def test_level() -> None:
    # t_{0.95, 3} = 2.353363 for a two-sided 90 % of four values; mean 5, squares 9 + 1 + 1 + 9,
    # s = sqrt(20 / 3), so s / sqrt(4) = sqrt(5 / 3).
    found = mean_interval([2.0, 4.0, 6.0, 8.0], level=0.9)
    assert (found.high - found.low) / 2 == pytest.approx(2.353363 * math.sqrt(5 / 3), rel=1e-6)


def test_shift_and_scale() -> None:
    a, b = mean_interval([1.0, 4.0, 2.5]), mean_interval([-20.0 + 3 * v for v in (1.0, 4.0, 2.5)])
    assert b.low == pytest.approx(-20 + 3 * a.low)
    assert b.high == pytest.approx(-20 + 3 * a.high)


def test_equal_values_have_no_width() -> None:
    found = mean_interval([0.25] * 4)
    assert (found.low, found.high) == (0.25, 0.25)


def test_coverage() -> None:
    # A 95 % interval misses the true mean in 1 of 20 of the cases: 2,000 repeats of 4 values,
    # standard error 0.5 %.
    values = 7 + 2 * torch.randn(2000, 4, generator=torch.Generator().manual_seed(3))
    intervals = [mean_interval(row) for row in values.tolist()]
    hits = sum(i.low <= 7 <= i.high for i in intervals) / len(intervals)
    assert hits == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(
    ("other", "expected"),
    [((0.0, 0.9), False), ((0.0, 1.0), True), ((1.5, 1.6), True), ((0.0, 9.0), True)],
)
def test_overlap(other: tuple[float, float], expected: bool) -> None:
    a, b = Interval(1.5, 1.0, 2.0, 3), Interval(sum(other) / 2, *other, 3)
    assert a.overlaps(b) == b.overlaps(a) == expected


@pytest.mark.parametrize("values", [[], [1.0]])
def test_too_few_values(values: list[float]) -> None:
    message = f"an interval needs at least 2 values, got {len(values)}"
    with pytest.raises(TooFewSamplesError, match=message):
        mean_interval(values)


def test_an_improvement_pairs_equal_seeds() -> None:
    before = [{"fid": 3.0}, {"fid": 7.0}]
    assert improvement([{"fid": 2.0}, {"fid": 4.0}], before, "fid") == mean_interval([1.0, 3.0])
    with pytest.raises(ValueError, match="zip"):
        improvement([{"fid": 2.0}], before, "fid")
