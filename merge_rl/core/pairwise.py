"""What is computed over pairs of feature rows: squared distances, and the checks before them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from merge_rl.core.statistics import check_features
from merge_rl.errors import ConfigError, StatisticsError


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i − y_j|² in float64 from one matrix product: (N, D), (M, D) -> (N, M).

    |x|² + |y|² − 2 x·y leaves rounding errors of a few ε (|x|² + |y|²) where the rows are equal.
    What is below 4 √D ε (|x|² + |y|²) is returned as 0: D = 2048 takes rows for equal that differ
    by 2e-7 of their length, about what float32 resolves. Centre the rows where they lie far out.
    """
    x, y = x.to(torch.float64), y.to(torch.float64)
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    rounding = 4 * math.sqrt(x.shape[1]) * torch.finfo(torch.float64).eps
    # In place: a second matrix of this size is the most memory that any caller needs.
    distances = torch.mm(x, y.T).mul_(-2).add_(norms)
    return distances.masked_fill_(distances < norms.mul_(rounding), 0.0)


def check_pair(x: Tensor, y: Tensor, *, at_least: int) -> None:
    """Refuse two feature sets that are not finite matrices (N, D), (M, D) of enough rows."""
    for features in (x, y):
        check_features(features, at_least=at_least)
    if x.shape[1] != y.shape[1] or x.shape[1] == 0:
        got = f"{x.shape[1]} and {y.shape[1]}"
        raise StatisticsError(f"expected features of one dimension, at least 1, got {got}")


def check_block(block: int) -> None:
    """Refuse blocks without rows."""
    if block < 1:
        raise ConfigError(f"expected blocks of at least 1 row, got {block}")
