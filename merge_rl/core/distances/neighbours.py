"""Precision, recall, density and coverage from nearest neighbours. Higher is better.

A ball around each point reaches to its k-th nearest neighbour in its own set; the balls of a set
stand for the region that it fills. Pairs are visited in square blocks, each once, so memory is set
by a number of bytes and not by the number of rows.

Distances are in float64. In float32 they take half the time (measured at D = 2048) and decide all
but some 1e-7 of the comparisons alike, but copies of a row come out at a distance from each other
that is not 0, and a backend that multiplies in TF32 keeps three digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from merge_rl.core.distances.kernels import check_pair, squared_distances
from merge_rl.core.distances.statistics import feature_mean
from merge_rl.errors import ConfigError

MAX_BYTES = 512 * 2**20


class PRDC(NamedTuple):
    """Precision, recall and coverage in 0..1, density at least 0; higher is better."""

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(
    real: Tensor, fake: Tensor, k: int = 5, *, closed: bool = False, max_bytes: int = MAX_BYTES
) -> PRDC:
    """Precision, recall, density and coverage of generated (fake) features against real ones.

    With a ball around each point that reaches to its k-th nearest neighbour in its own set:

    - precision: share of fakes inside at least one real ball;
    - recall: share of reals inside at least one fake ball;
    - density: number of real balls around a fake, averaged over fakes, divided by k;
    - coverage: share of reals whose own ball holds at least one fake.

    Precision and recall: Kynkäänniemi et al., 2019 (arXiv:1904.06991). Density and coverage: Naeem
    et al., 2020 (arXiv:2002.09797). All depend on the numbers of rows: compare equal numbers only.

    Args:
        real, fake: features (N, D) and (M, D), N and M > k, rows finite.
        k: neighbours that a ball reaches to, the point itself not counted.
        closed: count points on the surface of a ball (<=); by default they are outside (<).
        max_bytes: bound on the memory beyond the features.

    Raises StatisticsError for features that are not finite or of different D, TooFewSamplesError
    for k rows or fewer, ConfigError for k or `max_bytes` that are too small.
    """
    _check(real, fake, k)
    size = block_rows(real.shape[1], max_bytes)
    centre = feature_mean(real)
    real_radii = squared_radii(real, k, size, centre)
    fake_radii = squared_radii(fake, k, size, centre)
    balls = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    recalled = torch.zeros_like(covered)
    for i, j, distances in _crossing(fake, real, size, centre):
        inside = _within(distances, real_radii[j], closed)
        balls[i] += inside.sum(1, dtype=torch.int32)
        covered[j] |= inside.any(0)
        recalled[j] |= _within(distances, fake_radii[i, None], closed).any(0)
    return PRDC(
        precision=float((balls > 0).double().mean()),
        recall=float(recalled.double().mean()),
        density=int(balls.sum()) / (k * len(fake)),
        coverage=float(covered.double().mean()),
    )


def squared_radii(features: Tensor, k: int, size: int, centre: Tensor) -> Tensor:
    """Squared distance of each row (N, D) to its k-th nearest other row, (N,) float64.

    Each pair of blocks serves the rows of both.
    """
    nearest = torch.full((len(features), k), math.inf, dtype=torch.float64, device=features.device)
    starts = range(0, len(features), size)
    for start in starts:
        rows = _centred(features, start, size, centre)
        for other in starts[start // size :]:
            if other == start:
                distances = squared_distances(rows, rows).fill_diagonal_(math.inf)
            else:
                distances = squared_distances(rows, _centred(features, other, size, centre))
                _keep_smallest(nearest[other : other + size], distances.T)
            _keep_smallest(nearest[start : start + size], distances)
    return nearest[:, -1]


def block_rows(dim: int, max_bytes: int) -> int:
    """Rows B of a block such that two blocks of features and the matrices of their pairs fit.

    At the peak there are four B x D and four B x B matrices of 8 bytes: 32 (B² + B D) bytes. More
    than 4096 rows gain no speed.
    """
    half = dim / 2
    size = math.floor(math.sqrt(half * half + max_bytes / 32) - half)
    if size < 1:
        raise ConfigError(f"expected at least {32 * (dim + 1)} bytes for a block, got {max_bytes}")
    return min(size, 4096)


def _crossing(
    x: Tensor, y: Tensor, size: int, centre: Tensor
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared distances of all pairs of rows of x and y, block by block, with their places."""
    for start in range(0, len(x), size):
        rows = _centred(x, start, size, centre)
        for other in range(0, len(y), size):
            distances = squared_distances(rows, _centred(y, other, size, centre))
            yield slice(start, start + size), slice(other, other + size), distances


def _keep_smallest(nearest: Tensor, distances: Tensor) -> None:
    """Merge distances (B, M) into the k smallest so far, ascending (B, k), in place."""
    k = nearest.shape[1]
    found = distances.topk(min(k, distances.shape[1]), largest=False).values
    nearest.copy_(torch.cat([nearest, found], 1).sort(1).values[:, :k])


def _within(distances: Tensor, radii: Tensor, closed: bool) -> Tensor:
    return distances <= radii if closed else distances < radii


def _centred(features: Tensor, start: int, size: int, centre: Tensor) -> Tensor:
    return features[start : start + size].to(torch.float64) - centre


def _check(real: Tensor, fake: Tensor, k: int) -> None:
    if k < 1:
        raise ConfigError(f"expected at least 1 neighbour, got {k}")
    check_pair(real, fake, at_least=k + 1)
