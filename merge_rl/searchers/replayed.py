"""Around methods of other libraries that cannot be saved: their log is, and it is played again.

The log holds one *era*: the rounds since the method was last begun, at a centre and with a spread
of its own. `halve` and `recenter` begin the next era. All that a method asks is a function of
(seed, era, centre, spread, log), so that a restored one must ask bit for bit what it had asked; if
it does not, its library is another one, and going on would be another search.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from merge_rl.config import SearchConfig
from merge_rl.errors import RunError
from merge_rl.rng import derive_seed
from merge_rl.searchers.base import AskTell, SearchSpace, below_all


class Replayed(AskTell):
    """A searcher whose state is its centre, its spread and the log of (theta, reward)."""

    def __init__(self, config: SearchConfig, space: SearchSpace, seed: int) -> None:
        super().__init__(config, space, seed)
        self.era, self.spread = 0, config.std
        self.centre = space.origin.clone()
        self.spent = 0  # candidates told before this era
        self._seen = torch.empty(0, dtype=torch.float64)  # worst and best reward of all eras
        self._clear_log()

    # -------------------------------------------------------------------- what a method fills in

    def _begin(self) -> None:
        """Make the method anew, at `centre` and `spread`, with the draws of `era`."""
        raise NotImplementedError

    def _feed(self, rewards: Tensor) -> None:
        """Rewards (P,) of what was proposed last: finite, failures lowest; or all NaN: lost."""
        raise NotImplementedError

    def _recommend(self) -> Tensor:
        """The theta (D,) that the method would report."""
        raise NotImplementedError

    @property
    def _skips_lost_rounds(self) -> bool:
        """Whether a round of failures alone is kept from the method, which then asks others."""
        return True

    # ------------------------------------------------------------------------------------ the log

    def _clear_log(self) -> None:
        self._thetas: list[Tensor] = []
        self._rewards: list[Tensor] = []
        self.num_logged = 0  # candidates told in this era

    def _learn(self, rewards: Tensor) -> None:
        lost = not bool(rewards.isfinite().any())
        told = rewards if lost and self._skips_lost_rounds else below_all(rewards, self._seen)
        finite = torch.cat([self._seen, rewards[rewards.isfinite()]])
        if len(finite):
            self._seen = torch.stack([finite.min(), finite.max()])
        best = self._log(self.ask(), told)
        if not lost:
            self._mean = best

    def _log(self, thetas: Tensor, told: Tensor) -> Tensor:
        self._feed(told)
        self._thetas.append(thetas)
        self._rewards.append(told)
        self.num_logged += len(told)
        # In a replay, too: there are methods that draw to say what they recommend.
        return self._recommend()

    def _new_era(self, centre: Tensor, spread: float) -> None:
        self.spent += self.num_logged
        self.era += 1
        self._set_out(centre, spread)

    def _set_out(self, centre: Tensor, spread: float) -> None:
        self.centre, self.spread = centre.clone(), spread
        self._clear_log()
        self._asked = None
        self._begin()

    def halve(self) -> None:
        """Begin again at the mean, half as wide."""
        self._new_era(self._mean, 0.5 * self.spread)

    def _begin_at_mean(self) -> None:
        self._set_out(self._mean, self.spread)

    def _go_on_from_mean(self) -> None:
        self._new_era(self._mean, self.spread)

    def _seed(self, *names: str | int) -> int:
        """A seed of this era in [0, 2^32), as NumPy's older generators take it."""
        return derive_seed(self.seed, "search", self.config.name, self.era, *names) % 2**32

    # -------------------------------------------------------------------------------------- state

    def _tensors(self) -> dict[str, Tensor]:
        sizes = torch.tensor([len(rewards) for rewards in self._rewards], dtype=torch.int64)
        nothing = torch.empty(0, dtype=torch.float64)
        return {
            "centre": self.centre.clone(),
            "seen": self._seen.clone(),
            "log.sizes": sizes,
            "log.thetas": torch.cat([nothing.reshape(0, self.space.dim), *self._thetas]),
            "log.rewards": torch.cat([nothing, *self._rewards]),
        }

    def _scalars(self) -> dict[str, Any]:
        return {"era": self.era, "spread": self.spread, "spent": self.spent}

    def _restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        self.era, self.spent = int(scalars["era"]), int(scalars["spent"])
        self._seen = tensors["seen"].clone()
        self._set_out(tensors["centre"], float(scalars["spread"]))
        end = 0
        for size in tensors["log.sizes"].tolist():
            start, end = end, end + size
            self._replay(
                tensors["log.thetas"][start:end].clone(), tensors["log.rewards"][start:end].clone()
            )

    def _replay(self, thetas: Tensor, rewards: Tensor) -> None:
        """A round of the log once more: asked, compared, told."""
        self._require_same(self._propose(), thetas)
        self._log(thetas, rewards)

    def _require_same(self, asked: Tensor, logged: Tensor) -> None:
        if not torch.equal(asked, logged):
            raise RunError(
                f"the saved search cannot go on: {self.config.name} asks in round"
                f" {len(self._rewards)} what it had not asked; expected the version of its library"
                " that the run began with"
            )
