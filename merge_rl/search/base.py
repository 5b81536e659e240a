"""What every searcher here does alike: asking once, checking what is told, saving, failures.

A method fills in `_propose` and `_learn`; it sees rewards whose failures are NaN and keeps the
theta it would report in `_mean`. It is never asked twice for one round, and never told a round
that it did not ask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from merge_rl.config import SearchConfig
from merge_rl.core.search_space import SearchSpace
from merge_rl.errors import ConfigError, RunError
from merge_rl.rng import derive_seed, stream


class AskTell:
    """A searcher but for its method; `merge_rl.interfaces.Searcher` says what each call means."""

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
        """Take back what `_tensors` and `_scalars` gave; `rounds` and `_mean` are set already."""

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
        if self._asked is None and self.done:
            raise RunError(f"the search with {self.config.name} is done: nothing left to ask")
        if self._asked is None:
            self._asked = self._propose()
        return self._asked.clone()

    def tell(self, thetas: Tensor, rewards: Tensor) -> None:
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
