"""Candidates that are known before a search: rows of coefficients as thetas, or refused."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_rl.core.search_space import SearchSpace
from merge_rl.errors import ConfigError


def reach(space: SearchSpace, coefficients: Tensor, searcher: str) -> Tensor:
    """The theta (D,) of coefficients (K,) or (G, K); ConfigError says which maps a search needs."""
    try:
        return space.theta_of(coefficients)
    except ConfigError as error:
        raise ConfigError(
            f"{searcher} needs coefficients that this map does not reach: {error};"
            " choose the map affine or free"
        ) from None


def singles(space: SearchSpace, searcher: str) -> dict[str, Tensor]:
    """name -> the theta of that checkpoint alone, for all K of them."""
    alone = torch.eye(space.num_checkpoints, dtype=torch.float64)
    return {name: reach(space, row, searcher) for name, row in zip(space.names, alone, strict=True)}


def average(space: SearchSpace, members: list[int], searcher: str) -> Tensor:
    """The theta (D,) of the plain average of those checkpoints, by index."""
    row = torch.zeros(space.num_checkpoints, dtype=torch.float64)
    row[members] = 1 / len(members)
    return reach(space, row, searcher)
