"""CMA-ES whose learning rate follows the noise, by the library `cmaes`.

Nomura, Akimoto & Ono, 2023 (arXiv:2304.03473, "CMA-ES with Learning Rate Adaptation"): the rate
keeps the signal-to-noise ratio of the update constant, so that a population of ordinary size
climbs noisy and multimodal rewards. The mean is that of the distribution, not the luckiest draw.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from merge_rl.config import SearchConfig
from merge_rl.errors import MissingLibraryError, RunError
from merge_rl.searchers import base as population
from merge_rl.searchers.base import SearchSpace
from merge_rl.searchers.replayed import Replayed


class LearningRateCMA(Replayed):
    """Searcher around `cmaes.CMA(lr_adapt=True)`; a round is a generation."""

    def __init__(self, config: SearchConfig, space: SearchSpace, seed: int) -> None:
        super().__init__(config, space, seed)
        self.population = self.population_of(config)
        self._begin()

    @staticmethod
    def population_of(config: SearchConfig) -> int:
        """Draws a generation: the setting, 16 if unset. Refused without the library."""
        _library()
        return population.parallel(config, least=4)

    def _begin(self) -> None:
        self._last = self.centre.clone()  # the distribution's mean while it was sound
        self._make()

    def _make(self) -> None:
        self._method = _library().CMA(
            mean=self._last.numpy().copy(), sigma=self.spread, population_size=self.population,
            seed=self._seed("cma", len(self._rewards)), lr_adapt=True,
        )  # fmt: skip

    def _propose(self) -> Tensor:
        drawn = self._draw()
        if drawn is None or not bool(drawn.isfinite().all()):
            # The covariance fell below rounding: begin again, as wide as at first.
            self._make()
            drawn = self._draw()
        if drawn is None:  # pragma: no cover (a new covariance is the identity)
            raise RunError(f"{self.config.name} cannot draw from a covariance that is not finite")
        return drawn

    def _draw(self) -> Tensor | None:
        try:
            with np.errstate(all="ignore"):
                draws = [self._method.ask() for _ in range(self.population)]
        except np.linalg.LinAlgError:
            return None
        self._drawn = draws
        return torch.from_numpy(np.stack(draws))

    def _feed(self, rewards: Tensor) -> None:
        if bool(rewards.isnan().all()):
            return  # never told of: the next draws are others
        pairs = list(zip(self._drawn, (-rewards).tolist(), strict=True))
        with np.errstate(all="ignore"):
            self._method.tell(pairs)
        mean = torch.from_numpy(np.array(self._method.mean, dtype=np.float64))
        if bool(mean.isfinite().all()):
            self._last = mean

    def _recommend(self) -> Tensor:
        return self._last.clone()


def _library() -> Any:
    try:
        import cmaes
    except ImportError:
        raise MissingLibraryError("the searcher 'lr-cma'", "cmaes", "search") from None
    return cmaes
