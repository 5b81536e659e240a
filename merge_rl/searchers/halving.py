"""Successive halving: try all, drop the worse half, try the rest harder, until one is left.

Jamieson & Talwalkar, 2016 (arXiv:1502.07943, "Non-stochastic best arm identification"), with the
budget shared equally by the rungs. All that are left are tried together in every round, so that
they are compared on the same noise, and a candidate's value is its mean over all its rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merge_rl.config import SearchConfig
from merge_rl.errors import ConfigError
from merge_rl.searchers import base as population
from merge_rl.searchers.base import AskTell, SearchSpace


class HalvingRound(NamedTuple):
    """`rounds` rounds of `size` candidates, of which the better half goes to the next rung."""

    size: int
    rounds: int


def halving_rounds(count: int, evaluations: int) -> list[HalvingRound]:
    """The rungs for `count` candidates: sizes n, ceil(n/2), ..., 2; none for a single candidate.

    Every rung gets an equal share of the evaluations, in whole rounds but at least one; what the
    earlier ones leave over goes to the last.
    """
    sizes, size = [], count
    while size > 1:
        sizes.append(size)
        size = math.ceil(size / 2)
    plan, left = [], evaluations
    for i, size in enumerate(sizes):
        rounds = max(1, left // ((len(sizes) - i) * size))
        plan.append(HalvingRound(size, rounds))
        left -= rounds * size
    return plan


class Halving:
    """Which of `count` candidates are left after the rewards so far; its state can be saved."""

    def __init__(self, count: int, evaluations: int) -> None:
        self.count = count
        self.plan = halving_rounds(count, evaluations)
        self.rung = self.rounds = 0  # rounds told on this rung
        self.alive = torch.arange(count)
        self.sums = torch.zeros(count, dtype=torch.float64)  # NaN once failed
        self.tries = torch.zeros(count, dtype=torch.int64)

    @property
    def done(self) -> bool:
        """Whether one candidate is left."""
        return self.rung == len(self.plan)

    @property
    def values(self) -> Tensor:
        """Mean reward of each candidate (count,); -inf where one failed or was never tried."""
        means = self.sums / self.tries
        return torch.where(means.isfinite(), means, -torch.inf)

    @property
    def ranking(self) -> list[int]:
        """Indices of those that are left and have a value, best first."""
        values = self.values[self.alive]
        order = torch.argsort(values, descending=True, stable=True)
        return [int(self.alive[i]) for i in order if bool(values[i].isfinite())]

    def tell(self, rewards: Tensor) -> None:
        """Rewards of those that are left, in their order; NaN rules one out for good.

        A round in which all fail says nothing of any of them.
        """
        if bool(rewards.isfinite().any()):
            self.sums[self.alive] += rewards
            self.tries[self.alive] += 1
        self.rounds += 1
        if self.rounds >= self.plan[self.rung].rounds:
            self.rung, self.rounds = self.rung + 1, 0
            size = 1 if self.done else self.plan[self.rung].size
            order = torch.argsort(self.values[self.alive], descending=True, stable=True)
            self.alive = self.alive[order[:size].sort().values]

    def strike(self, index: int) -> None:
        """Rule out a candidate that failed elsewhere."""
        self.sums[index] = torch.nan
        self.tries[index] += 1

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the state to save, beside `scalars`."""
        return {
            "halving.alive": self.alive.clone(),
            "halving.sums": self.sums.clone(),
            "halving.tries": self.tries.clone(),
        }

    def scalars(self) -> dict[str, int]:
        """Numbers of the state to save, beside `tensors`."""
        return {"halving.rung": self.rung, "halving.rounds": self.rounds}

    def restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Continue from saved values."""
        for name in ("alive", "sums", "tries"):
            setattr(self, name, tensors[f"halving.{name}"].clone())
        self.rung = int(scalars["halving.rung"])
        self.rounds = int(scalars["halving.rounds"])


class HalvingSearch(AskTell):
    """The best of given candidates, by successive halving of the whole budget."""

    def __init__(
        self, config: SearchConfig, space: SearchSpace, seed: int, candidates: Mapping[str, Tensor]
    ) -> None:
        super().__init__(config, space, seed)
        self.population_of(config)
        if not candidates:
            raise ConfigError(f"{config.name} has no candidate to try")
        self.labels = tuple(candidates)
        self.thetas = torch.stack(list(candidates.values()))
        self.halving = Halving(len(candidates), space.evaluations)
        if self.halving.done:
            self._mean = self.thetas[0].clone()

    @staticmethod
    def population_of(config: SearchConfig) -> int:
        """At least 1: a round is what is left of the candidates, and the setting must be unset."""
        return population.planned(config)

    @property
    def done(self) -> bool:
        """Whether one candidate is left."""
        return self.halving.done

    @property
    def finalists(self) -> dict[str, Tensor]:
        """The best of those that are left, and up to three more by name."""
        found = {"mean": self.mean}
        for index in self.halving.ranking[:4]:
            if not torch.equal(self.thetas[index], self._mean):
                found[self.labels[index]] = self.thetas[index].clone()
        return found

    def _propose(self) -> Tensor:
        return self.thetas[self.halving.alive]

    def _learn(self, rewards: Tensor) -> None:
        self.halving.tell(rewards)
        if bool(rewards.isfinite().any()):
            self._lead()

    def _lead(self) -> None:
        best = self.halving.ranking[:1]
        self._mean = self.thetas[best[0]].clone() if best else self._mean

    def _go_on_from_mean(self) -> None:
        # The leader's samples are not finite: it cannot be the answer.
        for index in self.halving.ranking[:1]:
            self.halving.strike(index)

    def _tensors(self) -> dict[str, Tensor]:
        return self.halving.tensors()

    def _scalars(self) -> dict[str, Any]:
        return self.halving.scalars()

    def _restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        self.halving.restore(tensors, scalars)
