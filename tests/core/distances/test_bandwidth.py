"""The width of a Gaussian kernel from the data."""

from __future__ import annotations

import pytest
import torch

from merge_rl.core.distances import kernels as bandwidth
from merge_rl.core.distances.kernels import median_bandwidth
from merge_rl.errors import StatisticsError, TooFewSamplesError


def test_by_hand() -> None:
    # 0, 1, 3 on a line: distances 1, 2, 3.
    assert median_bandwidth(torch.tensor([[0.0, 5], [1, 5], [3, 5]])) == pytest.approx(2)


def test_large_sets_are_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "MAX_ROWS", 3)
    # Of ten rows the numbers 0, 3 and 6: distances 3, 3, 6.
    rows = torch.arange(10.0)[:, None]
    assert median_bandwidth(rows) == pytest.approx(3)
    assert median_bandwidth(2 * rows) == pytest.approx(6)


def test_what_has_no_width_is_refused() -> None:
    with pytest.raises(StatisticsError, match="features of different images, got mostly equal"):
        median_bandwidth(torch.ones(5, 2))
    with pytest.raises(TooFewSamplesError, match="got 1"):
        median_bandwidth(torch.ones(1, 2))
