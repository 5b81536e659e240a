"""The plain average of all checkpoints: nothing to search, the first thing to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_rl.config import SearchConfig
from merge_rl.core.search_space import SearchSpace
from merge_rl.errors import ConfigError
from merge_rl.search import population
from merge_rl.search.base import AskTell
from merge_rl.search.candidates import average


class Uniform(AskTell):
    """Done at once; the mean is the theta of coefficients 1/K."""

    def __init__(self, config: SearchConfig, space: SearchSpace, seed: int) -> None:
        super().__init__(config, space, seed)
        self.population_of(config)
        self._mean = average(space, list(range(space.num_checkpoints)), config.name)

    @staticmethod
    def population_of(config: SearchConfig) -> int:
        """Unset: there is no round."""
        return population.planned(config)

    @property
    def done(self) -> bool:
        """Always."""
        return True

    def recenter(self, theta: Tensor) -> None:
        """Nothing: the average of all does not begin anywhere."""

    def _propose(self) -> Tensor:
        return torch.empty(0, self.space.dim, dtype=torch.float64)

    def _learn(self, rewards: Tensor) -> None:
        raise ConfigError(f"{self.config.name} asks nothing, got {len(rewards)} rewards")
