"""What every searcher here does alike: asking once, checking what is told, saving, failures.

A method fills in `_propose` and `_learn`; it sees rewards whose failures are NaN and keeps the
theta it would report in `_mean`. It is never asked twice for one round, and never told a round
that it did not ask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from merge_rl.config import SearchConfig
from merge_rl.core.merging.ema_profiles import Profiles
from merge_rl.core.merging.linear_maps import FreeMap
from merge_rl.core.merging.maps import BoundedMap, CoefficientMap
from merge_rl.errors import ConfigError, RunError
from merge_rl.rng import derive_seed, stream


class AskTell:
    """Base of searchers, all but the method; `merge_rl.interfaces.Searcher` has the contract."""

    def __init__(self, config: SearchConfig, space: SearchSpace, seed: int) -> None:
        self.config, self.space, self.seed = config, space, seed
        self.rounds = 0  # told so far
        self._asked: Tensor | None = None
        self._mean = space.origin.clone()

    # ------------------------------------------------------------------ what a method fills in

    def _propose(self) -> Tensor:
        """The next thetas (P, D); called once a round."""
        raise NotImplementedError

    def _learn(self, rewards: Tensor) -> None:
        """Rewards (P,) of the thetas proposed last, NaN where one failed; updates `_mean`."""
        raise NotImplementedError

    def _begin_at_mean(self) -> None:
        """Nothing was told yet: start at `_mean`, as it is now, instead of the origin."""

    def _go_on_from_mean(self) -> None:
        """The `_mean` of the last round cannot be used, the one that is set now can."""

    def _tensors(self) -> dict[str, Tensor]:
        return {}

    def _scalars(self) -> dict[str, Any]:
        return {}

    def _restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Restore what `_tensors` and `_scalars` gave; `rounds` and `_mean` are set already."""

    # ------------------------------------------------------------------------------ the contract

    @property
    def done(self) -> bool:
        """Whether there is nothing left to ask."""
        return False

    @property
    def mean(self) -> Tensor:
        """The theta (D,) float64 to report now."""
        return self._mean.clone()

    @property
    def finalists(self) -> Mapping[str, Tensor]:
        """The theta to report."""
        return {"mean": self.mean}

    def ask(self) -> Tensor:
        """Candidates (P, D) float64 of this round, the same until told; RunError when done."""
        if self._asked is None and self.done:
            raise RunError(f"the search with {self.config.name} is done: nothing left to ask")
        if self._asked is None:
            self._asked = self._propose()
        return self._asked.clone()

    def tell(self, thetas: Tensor, rewards: Tensor) -> None:
        """Learn from the rewards (P,) of the thetas that were asked; what is not finite has failed.

        Raises ConfigError for other thetas than those asked.
        """
        asked = self.ask()
        if not torch.equal(thetas, asked) or rewards.shape != (len(asked),):
            raise ConfigError(
                f"expected rewards of the {len(asked)} thetas that {self.config.name} asked,"
                f" got {tuple(rewards.shape)} of {tuple(thetas.shape)}"
            )
        values = rewards.detach().to("cpu", torch.float64)
        self._learn(torch.where(values.isfinite(), values, torch.nan))
        self._asked = None
        self.rounds += 1

    def halve(self) -> None:
        """Nothing: the method has no step to halve."""

    def damp(self, factor: float) -> None:
        """Nothing: rewards that do not lag behind a pool need no smaller steps."""

    def recenter(self, theta: Tensor) -> None:
        """Go on from theta (D,): the mean of the next round."""
        self._asked, self._mean = None, theta.detach().to("cpu", torch.float64).clone()
        if self.rounds == 0:
            self._begin_at_mean()
        else:
            self._go_on_from_mean()

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name and, under "scalars", numbers."""
        scalars = {"rounds": self.rounds, "seed_check": derive_seed(self.seed, "search")}
        return {
            "tensors": {"mean": self.mean, **self._tensors()},
            "scalars": {**scalars, **self._scalars()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; ConfigError if it belongs to another seed."""
        tensors, scalars = state["tensors"], state["scalars"]
        if scalars["seed_check"] != derive_seed(self.seed, "search"):
            raise ConfigError("the saved search belongs to another seed")
        self.rounds, self._mean = int(scalars["rounds"]), tensors["mean"].clone()
        self._asked = None
        self._restore(tensors, scalars)

    def _stream(self, *names: str | int) -> torch.Generator:
        """The generator of a draw of this searcher, by name."""
        return stream(self.seed, "search", self.config.name, *names)


def below_all(rewards: Tensor, seen: Tensor) -> Tensor:
    """Rewards (P,) with NaN replaced by a number below every finite one, of them and of `seen`.

    The worst one minus the spread of them all: clearly worse, yet of their size, so that a method
    that fits a model to the numbers is not thrown off. Without any finite number it is -1e30.
    """
    known = torch.cat([seen, rewards])
    known = known[known.isfinite()]
    if len(known) == 0:
        return torch.full_like(rewards, -1e30)
    worst, spread = known.min(), known.max() - known.min()
    # Rounding must not undo the step down where the numbers agree.
    step = torch.maximum(spread, 1e-6 * worst.abs().clamp(min=1.0))
    return torch.where(rewards.isnan(), worst - step, rewards)


DEFAULT_POPULATION = 16


def parallel(config: SearchConfig, *, least: int = 2) -> int:
    """Population of a method that draws any number: the setting, 16 if unset."""
    given = DEFAULT_POPULATION if config.population is None else config.population
    if given < least:
        raise ConfigError(f"expected population >= {least}, got {given} for {config.name}")
    return given


def serial(config: SearchConfig) -> int:
    """Population of a method whose next candidate depends on the last one's reward: 1."""
    if config.population not in (None, 1):
        raise ConfigError(
            f"{config.name} evaluates one candidate after the other:"
            f" expected no population or 1, got {config.population}"
        )
    return 1


def planned(config: SearchConfig) -> int:
    """Population of a method whose candidates are given: 1 at least; the setting is refused."""
    if config.population is not None:
        raise ConfigError(
            f"{config.name} knows its candidates and how many of them it asks a round:"
            f" expected no population, got {config.population}"
        )
    return 1


@dataclass(frozen=True, eq=False, kw_only=True)
class SearchSpace:
    """The vectors theta (D,), the coefficients (G, K) they stand for, and what these weigh.

    `names`, `nimg` and `ema_std` are of the K checkpoints, None where a manifest does not say;
    `profiles` are the averages that they are, None where one is none, or not known.
    `evaluations` is about how many candidates the budget pays for, for methods that plan ahead;
    `renewed` is the share of the pool that a round of gradients renews.
    """

    map: CoefficientMap
    names: tuple[str, ...]
    nimg: tuple[int | None, ...] = ()
    ema_std: tuple[float | None, ...] = ()
    profiles: Profiles | None = None
    evaluations: int = 100
    renewed: float = 0.1
    origin: Tensor = field(init=False)  # (D,) theta = 0, where every search begins

    def __post_init__(self) -> None:
        count = self.map.num_checkpoints
        unknown = (None,) * count
        object.__setattr__(self, "nimg", self.nimg or unknown)
        object.__setattr__(self, "ema_std", self.ema_std or unknown)
        object.__setattr__(self, "origin", torch.zeros(self.map.dim, dtype=torch.float64))
        for name in ("names", "nimg", "ema_std"):
            if len(getattr(self, name)) != count:
                raise ConfigError(
                    f"expected {name} of {count} checkpoints, got {len(getattr(self, name))}"
                )
        if self.dim < 1:
            raise ConfigError(f"nothing to search: theta has {self.dim} dimensions")
        if self.evaluations < 1:
            raise ConfigError(f"expected at least 1 evaluation, got {self.evaluations}")

    @classmethod
    def plain(cls, dim: int, evaluations: int = 100) -> SearchSpace:
        """A space without structure: coefficients are theta itself, of `dim` checkpoints."""
        if dim < 1:
            raise ConfigError(f"nothing to search: theta has {dim} dimensions")
        init = torch.zeros(dim, dtype=torch.float64)
        names = tuple(f"checkpoint-{i}" for i in range(dim))
        return cls(map=FreeMap(init=init, scale=1.0), names=names, evaluations=evaluations)

    @property
    def dim(self) -> int:
        """D."""
        return self.map.dim

    @property
    def num_checkpoints(self) -> int:
        """K."""
        return self.map.num_checkpoints

    def coefficients(self, theta: Tensor) -> Tensor:
        """(D,) -> (G, K)."""
        return self.map(theta)

    def theta_of(self, coefficients: Tensor) -> Tensor:
        """The theta (D,) that stands for coefficients (K,), shared by all groups, or (G, K).

        Raises ConfigError where the map cannot reach them.
        """
        rows = coefficients.to(torch.float64)
        if rows.ndim == 1:
            rows = rows.expand(self.map.num_groups, -1)
        return self.map.theta_of(rows)


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
