"""A search along the reward's own gradient, as backpropagation through the rollout gives it.

Adam (Kingma & Ba, 2015, arXiv:1412.6980) in whitened theta, with a step that finds itself. Fresh
images at the mean are compared with the pool, which stands for the policies of the last rounds:

    l <- clip(l - RATE tanh(lag), -ln 32, ln 16)
    step = learning_rate e^l max(LEAST, 1 - t / T)

where `lag` is how many standard errors the fresh images are worse than images of the pool's own
policy would be. Images that are better than the pool promised ask for longer steps, worse ones for
shorter. Averages of the iterates, with weights that grow with t, are a finalist beside the mean.

What is told as a reward is minus the distance of the pool at the mean, freed of its bias. The mean
with the best one is a finalist always; a search whose pool stays worse, by more than a share of the
distance and `SURE` times what chance does to it, goes back to it with half the step, and when it
has done so `RETURNS` times it is done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from merge_rl.config import SearchConfig
from merge_rl.errors import ConfigError
from merge_rl.searchers.base import AskTell, SearchSpace, planned

STEP: Final = 0.12  # of theta, in the first round
BETAS: Final = (0.8, 0.95)
RATE: Final = 0.1  # of the logarithm of the step, a round
RANGE: Final = (-math.log(32), math.log(16))  # of that logarithm
LEAST: Final = 0.05  # where the schedule of the step stops
CLIP: Final = 3.0  # longest gradient, in running norms
MEMORY: Final = 0.8  # of the running norm
WORSE, SURE, PATIENCE = 0.1, 4.0, 10  # the last is how many rounds running
RETURNS: Final = 2


class Pathwise(AskTell):
    """Asks for the reward's gradient at its mean, and climbs it."""

    _average: Tensor
    _best_theta: Tensor
    _first: Tensor  # Adam's moments
    _second: Tensor
    _age: int  # rounds since they were last forgotten

    def __init__(self, config: SearchConfig, space: SearchSpace, seed: int) -> None:
        super().__init__(config, space, seed)
        self.population_of(config)
        self.total = max(1, space.evaluations)
        self.log_step = 0.0
        self.steps = self.returns = self.worse = 0
        self.norm = math.nan  # running
        self.noise = 0.0  # running
        self.best = -math.inf
        self._given: tuple[Tensor | None, float, float] = (None, 0.0, 0.0)
        self._begin_at_mean()

    @staticmethod
    def population_of(config: SearchConfig) -> int:
        """1: the mean; the setting must be unset."""
        return planned(config)

    @property
    def done(self) -> bool:
        """Whether it went back to its best as often as that may help."""
        return self.returns >= RETURNS

    @property
    def finalists(self) -> dict[str, Tensor]:
        """The mean, the average of the iterates, and the mean whose pool was best."""
        found = {"mean": self.mean, "average": self._average.clone()}
        return found | ({"best": self._best_theta.clone()} if self.best > -math.inf else {})

    @property
    def step(self) -> float:
        """How far each theta moves in the next round, about."""
        rate = STEP if self.config.learning_rate is None else self.config.learning_rate
        return rate * math.exp(self.log_step) * max(LEAST, 1 - self.steps / self.total)

    def tell(
        self,
        thetas: Tensor,
        rewards: Tensor,
        gradients: Tensor | None = None,
        lag: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        """Rewards (P,) and their gradients (P, D) at thetas (P, D); lag of the pool, noise of them.

        Nothing is learned from rewards alone, nor from a gradient that is not finite.
        """
        if gradients is not None and gradients.shape != thetas.shape:
            expected, got = tuple(thetas.shape), tuple(gradients.shape)
            raise ConfigError(f"expected gradients {expected} of as many thetas, got {got}")
        self._given = (gradients, lag, noise)
        super().tell(thetas, rewards)
        self._given = (None, 0.0, 0.0)

    def _propose(self) -> Tensor:
        return self._mean[None].clone()

    def _learn(self, rewards: Tensor) -> None:
        gradients, lag, noise = self._given
        if gradients is None or not bool(gradients.isfinite().all() & rewards.isfinite().all()):
            return
        self.noise = MEMORY * self.noise + (1 - MEMORY) * noise if self.noise else noise
        if self._keep_best(float(rewards[0])):
            return
        if self.steps:
            moved = self.log_step - RATE * math.tanh(lag)
            self.log_step = min(max(moved, RANGE[0]), RANGE[1])
        self._climb(self._clipped(gradients[0].detach().to("cpu", torch.float64)))

    def _keep_best(self, level: float) -> bool:
        """Note the best mean; whether the search went back to it."""
        if level > self.best:
            self.best, self._best_theta, self.worse = level, self._mean.clone(), 0
            return False
        margin = WORSE * abs(self.best) + SURE * self.noise
        self.worse = self.worse + 1 if level < self.best - margin else 0
        if self.worse < PATIENCE:
            return False
        self.returns, self.worse = self.returns + 1, 0
        self._mean = self._best_theta.clone()
        self._average = self._best_theta.clone()
        self.halve()
        self._forget()
        return True

    def _clipped(self, gradient: Tensor) -> Tensor:
        """The gradient (D,), drawn back to a few running norms."""
        norm = float(gradient.norm())
        first = math.isnan(self.norm)
        longest = norm if first else CLIP * self.norm
        kept = min(norm, longest)
        self.norm = norm if first else MEMORY * self.norm + (1 - MEMORY) * kept
        return gradient * (longest / norm) if norm > longest else gradient

    def _climb(self, gradient: Tensor) -> None:
        step = self.step  # before this round counts
        self.steps += 1
        self._age += 1
        first, second = BETAS
        self._first = first * self._first + (1 - first) * gradient
        self._second = second * self._second + (1 - second) * gradient.square()
        ahead = self._first / (1 - first**self._age)
        scale = (self._second / (1 - second**self._age)).sqrt() + 1e-12
        self._mean = self._mean + step * ahead / scale
        self._average = self._average + 4 / (self.steps + 3) * (self._mean - self._average)

    def halve(self) -> None:
        """Halve the step."""
        self.log_step = max(self.log_step - math.log(2), RANGE[0])

    def damp(self, factor: float) -> None:
        """Multiply the step."""
        moved = self.log_step + math.log(factor)
        self.log_step = min(max(moved, RANGE[0]), RANGE[1])

    def _begin_at_mean(self) -> None:
        self._average, self._best_theta = self._mean.clone(), self._mean.clone()
        self._forget()

    def _go_on_from_mean(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._first = torch.zeros_like(self._mean)
        self._second = torch.zeros_like(self._mean)
        self._age = 0

    def _tensors(self) -> dict[str, Tensor]:
        found = {"average": self._average, "best": self._best_theta}
        found |= {"first": self._first, "second": self._second}
        return {name: tensor.clone() for name, tensor in found.items()}

    def _scalars(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            name: getattr(self, name) for name in ("log_step", "steps", "returns", "worse", "noise")
        }
        # JSON has no NaN and no infinity.
        best = None if self.best == -math.inf else self.best
        return found | {"norm": None if math.isnan(self.norm) else self.norm,
                        "level": best, "age": self._age}  # fmt: skip

    def _restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        self._average, self._best_theta = tensors["average"].clone(), tensors["best"].clone()
        self._first, self._second = tensors["first"].clone(), tensors["second"].clone()
        self.log_step, self._age = float(scalars["log_step"]), int(scalars["age"])
        self.steps, self.returns, self.worse = (
            int(scalars[name]) for name in ("steps", "returns", "worse")
        )
        self.noise = float(scalars["noise"])
        norm, level = scalars["norm"], scalars["level"]
        self.norm = math.nan if norm is None else float(norm)
        self.best = -math.inf if level is None else float(level)
