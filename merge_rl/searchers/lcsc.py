"""Evolution over merging coefficients, after LCSC.

Liu et al., ICLR 2025 (arXiv:2404.02241, "Linear Combination of Saved Checkpoints Makes Consistency
and Diffusion Models Better"), from its description: an archive of coefficients and their rewards;
parents from the best of it; uniform crossover; sparse Gaussian mutation; now and then coefficients
scaled to sum 1; at the end the best are ranked again. Added here against noise: the leader is
tried again in every round, and its value is the mean of its tries.

It works on coefficients, not on theta, and needs a map that reaches those of either sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from merge_rl.config import SearchConfig
from merge_rl.core.merging.maps import CoefficientMap
from merge_rl.errors import ConfigError
from merge_rl.searchers import base as population
from merge_rl.searchers.base import LINEAR, AskTell, SearchSpace, bound, drawn_back, unbounded
from merge_rl.searchers.halving import Halving

PARENTS = 8  # the best of the archive
CROSSOVER_CHANCE = 0.5
RESCALE_CHANCE = 0.25
MUTATED = 3  # coefficients of a child that change, on average
FINAL_SHARE = 5  # one part in five of the evaluations ranks the finalists again
MOST_FINALISTS = 8


class LCSC(AskTell):
    """Archive, crossover, mutation; then successive halving of the best."""

    def __init__(self, config: SearchConfig, space: SearchSpace, seed: int) -> None:
        super().__init__(config, space, seed)
        self.population = self.population_of(config)
        self.start = space.coefficients(space.origin)  # (G, K)
        self.spread = config.std * coefficient_unit(space, config.name)
        self.keeps_sum = not _reaches(unbounded(space), self.start + 1)
        self.share = max(2, space.evaluations // FINAL_SHARE)
        self._archive = torch.empty(0, *self.start.shape, dtype=torch.float64)
        self._sums = torch.empty(0, dtype=torch.float64)
        self._tries = torch.empty(0, dtype=torch.int64)
        self._told = 0
        self._last: Tensor | None = None  # coefficients of the round that is asked
        self._halving: Halving | None = None

    @staticmethod
    def population_of(config: SearchConfig) -> int:
        """Children a round, the leader's new try among them: the setting, 16 if unset."""
        return population.parallel(config)

    @property
    def done(self) -> bool:
        """Whether the finalists were ranked again."""
        return self._halving is not None and self._halving.done

    @property
    def finalists(self) -> dict[str, Tensor]:
        """The leader, and up to three of the archive that follow it."""
        others = [self.space.theta_of(self._archive[i]) for i in self._ranking()[:4]]
        others = [theta for theta in others if not torch.equal(theta, self._mean)]
        return {"mean": self.mean, **{f"archive-{i + 2}": t for i, t in enumerate(others[:3])}}

    def _ranking(self) -> list[int]:
        """Indices into the archive, best first, by mean reward; failures are not among them."""
        if self._halving is not None and self._halving.ranking:
            return self._halving.ranking
        values = (self._sums / self._tries).nan_to_num(nan=-torch.inf)
        order = torch.argsort(values, descending=True, stable=True)
        ranking: list[int] = order[values[order].isfinite()].tolist()
        return ranking

    def _propose(self) -> Tensor:
        generator = self._stream(self.rounds)
        if self._halving is not None:
            rows = self._archive[self._halving.alive]
        elif self._ranking():
            rows = self._offspring(generator)
        else:
            rows = self._founders(generator)
        self._last = rows
        return torch.stack([self.space.theta_of(row) for row in rows])

    def _founders(self, generator: torch.Generator) -> Tensor:
        """The start, the average of all, and the start with every coefficient changed."""
        noise = torch.randn(
            self.population, *self.start.shape, generator=generator, dtype=torch.float64
        )
        rows = self._fit(self.start + self.spread * noise)
        uniform = torch.full_like(self.start, 1 / self.space.num_checkpoints)
        if self.rounds == 0:
            rows[0] = self.start
            if _reaches(self.space.map, uniform) and not torch.equal(uniform, self.start):
                rows[1] = uniform
        return rows

    def _offspring(self, generator: torch.Generator) -> Tensor:
        """The leader once more, and children of the best."""
        ranking = self._ranking()
        parents = self._archive[ranking[:PARENTS]]
        rows = [parents[0]]
        for _ in range(self.population - 1):
            first, second = torch.randint(len(parents), (2,), generator=generator).tolist()
            cross, scale = torch.rand(2, generator=generator).tolist()
            child = parents[first]
            if cross < CROSSOVER_CHANCE:
                child = crossover(child, parents[second], generator)
            child = mutate(child, self.spread, MUTATED, generator)
            # A single coefficient would be 1 each time.
            scaled = scale < RESCALE_CHANCE and child.shape[1] > 1
            rows.append(rescale(child) if scaled else child)
        return torch.cat([parents[:1], self._fit(torch.stack(rows[1:]))])

    def _fit(self, rows: Tensor) -> Tensor:
        """Rows (N, G, K) with the sums of the start where the map keeps those, inside its box."""
        if self.keeps_sum:
            rows = rows + (self.start.sum(1) - rows.sum(2))[:, :, None] / rows.shape[2]
        return drawn_back(rows, self.start, bound(self.space))

    def _learn(self, rewards: Tensor) -> None:
        self._told += len(rewards)
        if self._halving is not None:
            self._halving.tell(rewards)
        else:
            self._remember(rewards)
            if self._told >= self.space.evaluations - self.share:
                self._choose()
        best = self._ranking()[:1] if bool(rewards.isfinite().any()) else []
        self._mean = self.space.theta_of(self._archive[best[0]]) if best else self._mean

    def _remember(self, rewards: Tensor) -> None:
        # The rows that were asked, not those of the thetas: the way there and back rounds.
        rows, again = self._rows(), self._ranking()[:1]
        if again:
            # A failure of the leader is one of its weights, or of noise that others share.
            self._sums[again[0]] += rewards[0]
            self._tries[again[0]] += 1
            rows, rewards = rows[1:], rewards[1:]
        self._archive = torch.cat([self._archive, rows])
        self._sums = torch.cat([self._sums, rewards])
        self._tries = torch.cat([self._tries, torch.ones(len(rows), dtype=torch.int64)])

    def _rows(self) -> Tensor:
        if self._last is None:  # pragma: no cover (telling asks first)
            raise RuntimeError("nothing was asked")
        return self._last

    def _choose(self) -> None:
        """Rank the best again: keep them alone, in their order."""
        size = min(MOST_FINALISTS, max(2, self.share // 4))
        best = self._ranking()[:size]
        if best:
            self._archive = self._archive[best]
            self._sums, self._tries = self._sums[best], self._tries[best]
            self._halving = Halving(len(best), self.share)

    def halve(self) -> None:
        """Mutate half as far."""
        self.spread, self._asked = 0.5 * self.spread, None

    def _begin_at_mean(self) -> None:
        self.start = self.space.coefficients(self._mean)

    def _go_on_from_mean(self) -> None:
        # The leader makes samples that are not finite: it cannot be the answer, nor a parent.
        for index in self._ranking()[:1]:
            self._sums[index] = torch.nan
            if self._halving is not None:
                self._halving.strike(index)

    def _tensors(self) -> dict[str, Tensor]:
        own = {
            "start": self.start.clone(),
            "archive": self._archive.clone(),
            "archive.sums": self._sums.clone(),
            "archive.tries": self._tries.clone(),
        }
        return own if self._halving is None else {**own, **self._halving.tensors()}

    def _scalars(self) -> dict[str, Any]:
        own = {"spread": self.spread, "told": self._told}
        return own if self._halving is None else {**own, **self._halving.scalars()}

    def _restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        self.start, self._archive = tensors["start"].clone(), tensors["archive"].clone()
        self._sums, self._tries = tensors["archive.sums"].clone(), tensors["archive.tries"].clone()
        self.spread, self._told = float(scalars["spread"]), int(scalars["told"])
        self._halving = None
        if "halving.alive" in tensors:
            self._halving = Halving(len(self._archive), self.share)
            self._halving.restore(tensors, scalars)


def coefficient_unit(space: SearchSpace, searcher: str) -> float:
    """How far a unit of theta moves a coefficient: the largest move, in the median direction.

    ConfigError unless the map takes coefficients of either sign.
    """
    free = unbounded(space)
    start = free(space.origin)
    mixed = start.clone()
    mixed[:, 0] -= 2.0 + start[:, 0]
    mixed[:, -1] += 2.0 + start[:, 0]
    if not _reaches(free, mixed):
        raise ConfigError(
            f"{searcher} searches coefficients of either sign, which the map {space.map.kind} does"
            f" not reach; choose {LINEAR}"
        )
    steps = torch.eye(space.dim, dtype=torch.float64)
    moves = torch.stack([(free(step) - start).abs().max() for step in steps])
    return float(moves.median())


def _reaches(free: CoefficientMap, rows: Tensor) -> bool:
    try:
        free.theta_of(rows)
    except ConfigError:
        return False
    return True


SMALLEST_SUM = 0.1  # a row that sums to less is not scaled: the factor would blow it up


def crossover(first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
    """Each coefficient from either parent with the same chance: (G, K), (G, K) -> (G, K)."""
    take = torch.rand(first.shape, generator=generator) < 0.5
    return torch.where(take, first, second)


def mutate(row: Tensor, std: float, count: float, generator: torch.Generator) -> Tensor:
    """Normal(0, std²) added to about `count` of the coefficients, and to one at the least."""
    chance = torch.rand(row.shape, generator=generator, dtype=torch.float64)
    chosen = chance < count / row.numel()
    chosen.view(-1)[chance.argmin()] = True
    noise = torch.randn(row.shape, generator=generator, dtype=torch.float64)
    return row + std * noise * chosen


def rescale(rows: Tensor) -> Tensor:
    """Rows (G, K) divided by their sums; those with a sum below 0.1 are left alone."""
    sums = rows.sum(1, keepdim=True)
    return torch.where(sums > SMALLEST_SUM, rows / sums, rows)
