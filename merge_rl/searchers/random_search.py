"""Random search: Gaussian draws around the start, and the best of them tried again.

Half of the evaluations goes to draws of Normal(0, std²), the start itself among them, each tried
once. A single noisy reward flatters the luckiest, so the other half goes to successive halving of
the best draws, on rewards of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from merge_rl.config import SearchConfig
from merge_rl.searchers import base as population
from merge_rl.searchers.base import AskTell, SearchSpace
from merge_rl.searchers.halving import Halving

MOST_FINALISTS = 16


def random_plan(evaluations: int) -> tuple[int, int, int]:
    """Draws, finalists (a quarter of the draws, 16 at most), evaluations for the finalists."""
    draws = max(2, evaluations // 2)
    finalists = min(MOST_FINALISTS, max(2, draws // 4))
    return draws, finalists, max(finalists, evaluations - draws)


class RandomSearch(AskTell):
    """The best of Gaussian draws around theta 0."""

    def __init__(self, config: SearchConfig, space: SearchSpace, seed: int) -> None:
        super().__init__(config, space, seed)
        self.population = self.population_of(config)
        self.draws, self.num_finalists, self.share = random_plan(space.evaluations)
        self.centre, self.spread = space.origin.clone(), config.std
        self._thetas = torch.empty(0, space.dim, dtype=torch.float64)
        self._rewards = torch.empty(0, dtype=torch.float64)
        self._halving: Halving | None = None

    @staticmethod
    def population_of(config: SearchConfig) -> int:
        """Draws a round: the setting, 16 if unset."""
        return population.parallel(config, least=1)

    @property
    def done(self) -> bool:
        """Whether the draws are made and one is left of the best."""
        return self._halving is not None and self._halving.done

    @property
    def finalists(self) -> dict[str, Tensor]:
        """The best, and up to three that follow it."""
        best = [self._thetas[i].clone() for i in self._ranking()[:4]]
        others = [theta for theta in best if not torch.equal(theta, self._mean)]
        return {"mean": self.mean, **{f"draw-{i + 2}": t for i, t in enumerate(others[:3])}}

    def _ranking(self) -> list[int]:
        """Indices, best first: of the finalists by their own rewards, else of all draws."""
        if self._halving is not None and self._halving.ranking:
            return self._halving.ranking
        values = self._rewards.nan_to_num(nan=-torch.inf)
        order = torch.argsort(values, descending=True, stable=True)
        return [int(i) for i in order if bool(values[i].isfinite())]

    def _propose(self) -> Tensor:
        if self._halving is not None:
            return self._thetas[self._halving.alive]
        count = min(self.population, self.draws - len(self._thetas))
        noise = torch.randn(
            count, self.space.dim, generator=self._stream(self.rounds), dtype=torch.float64
        )
        thetas = self.centre + self.spread * noise
        if len(self._thetas) == 0:
            thetas[0] = self.centre
        return thetas

    def _learn(self, rewards: Tensor) -> None:
        if self._halving is not None:
            self._halving.tell(rewards)
        else:
            self._thetas = torch.cat([self._thetas, self.ask()])
            self._rewards = torch.cat([self._rewards, rewards])
            if len(self._thetas) >= self.draws:
                self._choose()
        best = self._ranking()[:1] if bool(rewards.isfinite().any()) else []
        self._mean = self._thetas[best[0]].clone() if best else self._mean

    def _choose(self) -> None:
        """Keep the best draws alone, in their order, and begin to halve them."""
        values = self._rewards.nan_to_num(nan=-torch.inf)
        order = torch.argsort(values, descending=True, stable=True)[: self.num_finalists]
        self._thetas, self._rewards = self._thetas[order], self._rewards[order]
        self._halving = Halving(len(order), self.share)

    def halve(self) -> None:
        """Draw half as far from the start."""
        self.spread, self._asked = 0.5 * self.spread, None

    def _begin_at_mean(self) -> None:
        self.centre = self.mean

    def _go_on_from_mean(self) -> None:
        # Whatever led makes samples that are not finite: it cannot be the answer.
        for index in self._ranking()[:1]:
            self._rewards[index] = torch.nan
            if self._halving is not None:
                self._halving.strike(index)

    def _tensors(self) -> dict[str, Tensor]:
        own = {
            "centre": self.centre.clone(),
            "thetas": self._thetas.clone(),
            "rewards": self._rewards.clone(),
        }
        return own if self._halving is None else {**own, **self._halving.tensors()}

    def _scalars(self) -> dict[str, Any]:
        own = {"spread": self.spread}
        return own if self._halving is None else {**own, **self._halving.scalars()}

    def _restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        self.centre, self.spread = tensors["centre"].clone(), float(scalars["spread"])
        self._thetas, self._rewards = tensors["thetas"].clone(), tensors["rewards"].clone()
        self._halving = None
        if "halving.alive" in tensors:
            self._halving = Halving(len(self._thetas), self.share)
            self._halving.restore(tensors, scalars)
