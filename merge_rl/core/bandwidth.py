"""A bandwidth for Gaussian kernels, from the data."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_rl.core.pairwise import squared_distances
from merge_rl.core.statistics import check_features
from merge_rl.errors import StatisticsError

MAX_ROWS = 2000


def median_bandwidth(features: Tensor) -> float:
    """Median of |y_i − y_j| over the pairs i < j of features (M, D), M >= 2.

    The usual choice where nothing else is known (Gretton et al., 2012, JMLR 13, section 8). Of
    more than 2,000 rows, 2,000 evenly spaced ones are taken. StatisticsError where it is 0, as it
    is if most rows are equal.
    """
    check_features(features, at_least=2)
    count = len(features)
    picked = torch.arange(min(count, MAX_ROWS), device=features.device) * count
    rows = features[picked // min(count, MAX_ROWS)]
    squared = squared_distances(rows, rows)
    above = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
    median = float(squared[above[0], above[1]].median().sqrt())
    if median <= 0:
        raise StatisticsError("expected features of different images, got mostly equal rows")
    return median
