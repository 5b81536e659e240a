"""Searchers without a search: greedy soup, EMA grid, best checkpoint, uniform average.

The greedy soup is that of Wortsman et al., 2022 (arXiv:2203.05482, "Model soups", recipe 1), under
noise: each comparison of the soup with and without the next checkpoint is made on the same images,
over several rounds. A third of the evaluations goes to the ranking, the rest equally to the K - 1
additions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merge_rl.config import SearchConfig
from merge_rl.core.merging.ema_profiles import Profiles, exponent_from_std, profile_name
from merge_rl.errors import ConfigError
from merge_rl.searchers import base as population
from merge_rl.searchers.base import AskTell, SearchSpace, average, bound, reach, singles
from merge_rl.searchers.halving import HalvingSearch


def soup_plan(checkpoints: int, evaluations: int) -> tuple[int, int]:
    """Rounds of all K checkpoints for the ranking, and of two soups for each addition."""
    ranking = max(1, evaluations // (3 * checkpoints))
    left = evaluations - ranking * checkpoints
    return ranking, max(1, left // (2 * max(1, checkpoints - 1)))


class GreedySoup(AskTell):
    """The soup so far is the mean; done when every checkpoint had its chance."""

    def __init__(self, config: SearchConfig, space: SearchSpace, seed: int) -> None:
        super().__init__(config, space, seed)
        self.population_of(config)
        self.thetas = torch.stack(list(singles(space, config.name).values()))
        self.plan = soup_plan(len(self.thetas), space.evaluations)
        self.order: list[int] = []  # by rank, once that is known
        self.tried = 0  # how many of `order` had their chance
        self.soup: list[int] = []  # indices in the order of their addition
        self._clear(len(self.thetas))
        if len(self.thetas) == 1:
            self.order, self.soup, self.tried = [0], [0], 1
            self._mean = self.thetas[0].clone()

    @staticmethod
    def population_of(config: SearchConfig) -> int:
        """At least 1: the method's own, and the setting must be unset."""
        return population.planned(config)

    @property
    def done(self) -> bool:
        """Whether every checkpoint that works was tried."""
        return bool(self.order) and self.tried == len(self.order)

    @property
    def finalists(self) -> dict[str, Tensor]:
        """The soup, and the checkpoint that ranked first."""
        found = {"mean": self.mean}
        if len(self.soup) > 1:
            found[self.space.names[self.order[0]]] = self.thetas[self.order[0]].clone()
        return found

    def _clear(self, size: int) -> None:
        self._sums = torch.zeros(size, dtype=torch.float64)
        self._told = self._informed = 0  # rounds of this comparison, and those with a result

    def _propose(self) -> Tensor:
        if not self.order:
            return self.thetas
        grown = [*self.soup, self.order[self.tried]]
        return torch.stack([self._average(self.soup), self._average(grown)])

    def _average(self, members: list[int]) -> Tensor:
        return average(self.space, members, self.config.name)

    def _learn(self, rewards: Tensor) -> None:
        self._told += 1
        if bool(rewards.isfinite().any()):
            self._informed += 1
            self._sums += rewards  # NaN stays: who fails once is out
        if not self.order:
            self._rank()
        elif self._told == self.plan[1]:
            self._decide()

    def _rank(self) -> None:
        values = torch.where(self._sums.isfinite(), self._sums, -torch.inf)
        order = torch.argsort(values, descending=True, stable=True).tolist()
        works = [i for i in order if bool(values[i].isfinite())] if self._informed else []
        if works:
            self._mean = self.thetas[works[0]].clone()
        # Where nothing works yet, the ranking goes on: no soup can be made of nothing.
        if self._told >= self.plan[0] and works:
            self.order, self.soup, self.tried = works, works[:1], 1
            self._clear(2)

    def _decide(self) -> None:
        without, with_next = self._sums.tolist()
        # A soup that fails gives way to one that does not; NaN compares as false.
        if with_next > without or (without != without and with_next == with_next):
            self.soup = [*self.soup, self.order[self.tried]]
        self._mean = self._average(self.soup)
        self.tried += 1
        self._clear(2)

    def _go_on_from_mean(self) -> None:
        # What leads makes samples that are not finite: out with what was added to it last.
        if not self.order:
            values = torch.where(self._sums.isfinite(), self._sums, -torch.inf)
            self._sums[values.argmax()] = torch.nan
            return
        if len(self.soup) > 1:
            self.soup = self.soup[:-1]
        elif not self.done:
            self.soup, self.tried = [self.order[self.tried]], self.tried + 1
        self._clear(2)

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "soup.order": torch.tensor(self.order, dtype=torch.int64),
            "soup.members": torch.tensor(self.soup, dtype=torch.int64),
            "soup.sums": self._sums.clone(),
        }

    def _scalars(self) -> dict[str, Any]:
        return {"tried": self.tried, "told": self._told, "informed": self._informed}

    def _restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        self.order = [int(i) for i in tensors["soup.order"]]
        self.soup = [int(i) for i in tensors["soup.members"]]
        self._sums = tensors["soup.sums"].clone()
        self.tried, self._told = int(scalars["tried"]), int(scalars["told"])
        self._informed = int(scalars["informed"])


WIDTHS = tuple(round(float(width), 3) for width in np.geomspace(0.01, 0.25, 15))
EVALUATIONS_EACH = 8  # of the budget, for each candidate of the grid
SAME = 1e-6  # coefficients closer than this are one candidate
LARGEST_SUM = 10.0  # of |coefficients|: beyond it a fit is a small difference of large parts


class EmaGrid(HalvingSearch):
    """Successive halving over EMA profiles."""

    def __init__(self, config: SearchConfig, space: SearchSpace, seed: int) -> None:
        rows = profile_grid(
            known_profiles(space, config.name), limit=space.evaluations // EVALUATIONS_EACH
        )
        largest = {label: float(row.abs().max()) for label, row in rows.items()}
        # If none is inside the map's box, the refusal names the bound that the nearest one needs.
        limit = max(bound(space), min(largest.values()))
        chosen = {label: row for label, row in rows.items() if largest[label] <= limit}
        candidates = {label: reach(space, row, config.name) for label, row in chosen.items()}
        super().__init__(config, space, seed, candidates)


def known_profiles(space: SearchSpace, searcher: str) -> Profiles:
    """The profiles of all K checkpoints; ConfigError lists what is not known."""
    if space.profiles is not None:
        return space.profiles
    missing = []
    for kind, values in (("nimg", space.nimg), ("ema_std", space.ema_std)):
        names = [n for n, value in zip(space.names, values, strict=True) if value is None]
        if names:
            listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
            missing.append(f"{kind} of {listed}")
    if missing:
        raise ConfigError(
            f"{searcher} needs nimg and ema_std of every checkpoint in the manifest,"
            f" missing: {'; '.join(missing)}"
        )
    nimg = [float(value) for value in space.nimg if value is not None]
    return Profiles.of_widths(nimg, [value for value in space.ema_std if value is not None])


def grid_ends(nimg: Sequence[int], count: int) -> list[int]:
    """`count` ends of training, newest first: spread evenly over the later half of the saved."""
    saved = sorted(set(nimg), reverse=True)
    later = saved[: (len(saved) + 1) // 2]
    places = np.linspace(0, len(later) - 1, min(count, len(later))).round().astype(int)
    return [later[i] for i in places]


def profile_grid(profiles: Profiles, *, limit: int) -> dict[str, Tensor]:
    """label -> coefficients (K,) float64 of each profile; about `limit`, one end's at the least.

    A profile that ends at T is rebuilt from the checkpoints up to T; later ones get 0. Fits that
    are ill-conditioned and repetitions are left out. ConfigError if nothing remains.
    """
    own = sorted(set(profiles.gamma.tolist()))
    named = {profile_name(gamma): gamma for gamma in [*map(exponent_from_std, WIDTHS), *own]}
    found: dict[str, Tensor] = {}
    refusal = ""
    ends = [int(end) for end in profiles.nimg.tolist()]
    for end in grid_ends(ends, max(1, limit // len(named))):
        for name, gamma in sorted(named.items(), key=lambda item: -item[1]):
            try:
                row = profiles.row(end, gamma)
            except ConfigError as error:
                refusal = f": {error}"
                continue
            new = all(float((row - other).abs().max()) > SAME for other in found.values())
            if new and float(row.abs().sum()) <= LARGEST_SUM:
                found[f"{name} at nimg {end}"] = row
    if not found:
        raise ConfigError(f"no EMA profile can be rebuilt from these checkpoints{refusal}")
    return found


class BestCheckpoint(HalvingSearch):
    """Successive halving over the checkpoints."""

    def __init__(self, config: SearchConfig, space: SearchSpace, seed: int) -> None:
        super().__init__(config, space, seed, singles(space, config.name))


class Uniform(AskTell):
    """Done at once; the mean is the theta of coefficients 1/K."""

    def __init__(self, config: SearchConfig, space: SearchSpace, seed: int) -> None:
        super().__init__(config, space, seed)
        self.population_of(config)
        self._mean = average(space, list(range(space.num_checkpoints)), config.name)

    @staticmethod
    def population_of(config: SearchConfig) -> int:
        """None, and the setting must be unset: there is no round."""
        population.planned(config)
        return 0

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
