"""Coefficients as thetas: what a map reaches, what it does not, and the box around it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from merge_rl.core.coefficients import BoundedMap, CoefficientMap
from merge_rl.core.search_space import SearchSpace
from merge_rl.errors import ConfigError

LINEAR = "the map whitened, affine or free"  # those that reach coefficients of either sign


def reach(space: SearchSpace, coefficients: Tensor, searcher: str) -> Tensor:
    """The theta (D,) of coefficients (K,) or (G, K); ConfigError says which maps a search needs."""
    try:
        return space.theta_of(coefficients)
    except ConfigError as error:
        largest = float(coefficients.abs().max())
        hint = f"a bound of at least {largest:g}" if largest > bound(space) else LINEAR
        raise ConfigError(
            f"{searcher} needs coefficients that this map does not reach: {error}; choose {hint}"
        ) from None


def bound(space: SearchSpace) -> float:
    """The largest |coefficient| that the map allows; infinity if it sets none."""
    return space.map.limit if isinstance(space.map, BoundedMap) else math.inf


def unbounded(space: SearchSpace) -> CoefficientMap:
    """The map without its box."""
    return space.map.inner if isinstance(space.map, BoundedMap) else space.map


def drawn_back(rows: Tensor, start: Tensor, limit: float) -> Tensor:
    """Rows (N, G, K) inside ± limit: start + t (row - start), with the largest t <= 1 that fits.

    What keeps the sum of the start does so afterwards.
    """
    moves = rows - start
    room = (limit - start * moves.sign()) / moves.abs()
    share = torch.where(moves == 0, torch.inf, room).amin(2, keepdim=True).clamp(0, 1)
    return start + share * moves


def singles(space: SearchSpace, searcher: str) -> dict[str, Tensor]:
    """name -> the theta of that checkpoint alone, for all K of them."""
    alone = torch.eye(space.num_checkpoints, dtype=torch.float64)
    return {name: reach(space, row, searcher) for name, row in zip(space.names, alone, strict=True)}


def average(space: SearchSpace, members: list[int], searcher: str) -> Tensor:
    """The theta (D,) of the plain average of those checkpoints, by index."""
    row = torch.zeros(space.num_checkpoints, dtype=torch.float64)
    row[members] = 1 / len(members)
    return reach(space, row, searcher)
