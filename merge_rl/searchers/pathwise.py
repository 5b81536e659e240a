"""A search along the reward's own gradient, as backpropagation through the rollout gives it.

The gradient is measured at a pool of images that the means of the last rounds made. Steps from mean
to mean by what was wrong with means of ten rounds ago swing ever wider. So a round's mean lies a
bounded way from the centre c of the means that filled the pool, and moves no further than these do:

    c <- c + a (theta - c),   a = 2 s / (1 + s)       s: share of the pool that a round renews
    theta = c + step / a u,   step = learning_rate e^l / sqrt(D) max(LEAST, 1 - t / T)

c has the mean age of the pool's images, (1 / s - 1) / 2 rounds. u is Adam's direction (Kingma & Ba,
2015, arXiv:1412.6980) without the first of its corrections, so that it is short while it rests on
few gradients; a steady one moves theta by learning_rate e^l a round, whatever the dimension D.
Averages of the means, with weights that grow with t, are a finalist beside the last.

The step finds itself by what it led to: the newer half of the pool against the older one, which is
z better, in standard deviations of what chance does to the difference of two halves,

    l <- l + min(1, 2 s t) GROW tanh max(|z| - DOUBT, 0)   where z > 0, else with - SHRINK.

In round t the newer half has had 2 s t of its images from the search.
What fresh images do to the pool's distance would not tell: of a pool on one side of the optimum
those on the other side make a good mixture, and means swing about it ever wider.

What is told as a reward is minus the distance of the pool, freed of its bias; another metric of the
pool may be told beside it. The centre where either was best is a finalist always. A search whose
pool stays worse by one of them, by more than a share of the best and `SURE` times what chance does,
goes back to that centre with half the step; once it has done so `RETURNS` times it is done.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from merge_rl.config import SearchConfig
from merge_rl.errors import ConfigError
from merge_rl.searchers.base import AskTell, SearchSpace, planned

STEP: Final = 0.7  # of theta, a round, at first
GROW, SHRINK = 0.25, 0.3  # of the log step, a round at most
SHORTEST, LONGEST = -math.log(4), math.log(16)  # of the log step
DOUBT: Final = 0.5  # what of a difference counts as chance, in standard deviations of it
BETAS: Final = (0.8, 0.95)
LEAST: Final = 0.05  # where the schedule of the step stops
CLIP: Final = 3.0  # longest gradient, in running norms
MEMORY: Final = 0.8  # of the running norm, and of what chance does to a level
WORSE, SURE, PATIENCE = 0.1, 4.0, 10  # the last is how many rounds running
RETURNS: Final = 2
WATCHED: Final = ("best", "best by second")  # finalists, by what they are the best of


@dataclass(frozen=True, eq=False)
class Watch:
    """The best level of a metric so far, higher is better, and where it was."""

    theta: Tensor | None = None  # (D,) None: no level is known
    best: float = -math.inf
    noise: float = 0.0  # running; what chance does to a level
    behind: bool = False  # whether the last level was clearly worse

    def seen(self, level: float, noise: float, theta: Tensor) -> Watch:
        """After another level."""
        noise = MEMORY * self.noise + (1 - MEMORY) * noise if self.noise else noise
        if level > self.best:
            return Watch(theta.clone(), level, noise)
        margin = WORSE * abs(self.best) + SURE * noise
        return dataclasses.replace(self, noise=noise, behind=level < self.best - margin)

    def again(self) -> Watch:
        """As it is where it was best, until that is measured once more."""
        return dataclasses.replace(self, best=-math.inf, behind=False)


@dataclass(frozen=True, kw_only=True)
class Slope:
    """What is told with a reward of a search along gradients."""

    gradients: Tensor  # (P, D), of the rewards
    noise: float = 0.0  # of the rewards
    trend: float | None = None  # what the newer half of the pool is better by, where they differ
    second: tuple[float, float] | None = None  # another distance and its noise, where looked at


class Pathwise(AskTell):
    """Asks for the reward's gradient at its mean, and climbs it."""

    _average: Tensor
    _centre: Tensor  # of the means that filled the pool
    _first: Tensor  # Adam's moments
    _second: Tensor
    _age: int  # rounds since they were last forgotten
    _slope: Slope | None = None

    def __init__(self, config: SearchConfig, space: SearchSpace, seed: int) -> None:
        super().__init__(config, space, seed)
        self.population_of(config)
        self.total = max(1, space.evaluations)
        self.share = 2 * space.renewed / (1 + space.renewed)
        self.log_step = 0.0
        self.steps = self.returns = self.worse = 0
        self.blamed = 0  # the metric that it went back for, of the reward and the second
        self.norm = math.nan  # running
        self.watches = (Watch(), Watch())  # of the reward, and of the second metric
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
        """The mean, the average of the means, and the centres whose pools were best."""
        found = {"mean": self.mean, "average": self._average.clone()}
        known = {n: w.theta for n, w in zip(WATCHED, self.watches, strict=True)}
        return found | {n: theta.clone() for n, theta in known.items() if theta is not None}

    @property
    def step(self) -> float:
        """How far theta moves a round along a steady gradient, per sqrt(D) coordinate."""
        rate = STEP if self.config.learning_rate is None else self.config.learning_rate
        left = max(LEAST, 1 - self.steps / self.total)
        return rate * math.exp(self.log_step) * left / math.sqrt(self.space.dim)

    def tell(self, thetas: Tensor, rewards: Tensor, slope: Slope | None = None) -> None:
        """Rewards (P,) and their gradients at thetas (P, D).

        Nothing is learned from rewards alone, nor from a gradient that is not finite.
        """
        if slope is not None and slope.gradients.shape != thetas.shape:
            expected, got = tuple(thetas.shape), tuple(slope.gradients.shape)
            raise ConfigError(f"expected gradients {expected} of as many thetas, got {got}")
        self._slope = slope
        super().tell(thetas, rewards)
        self._slope = None

    def _propose(self) -> Tensor:
        return self._mean[None].clone()

    def _learn(self, rewards: Tensor) -> None:
        slope = self._slope
        if slope is None or not bool(slope.gradients.isfinite().all() & rewards.isfinite().all()):
            return
        self._look(float(rewards[0]), slope)
        if self.worse >= PATIENCE:
            self._go_back()
            return
        self._pace(slope.trend)
        self._centre = self._centre + self.share * (self._mean - self._centre)
        self._climb(self._clipped(slope.gradients[0].detach().to("cpu", torch.float64)))

    def _look(self, level: float, slope: Slope) -> None:
        """Note how good the pool is: images of the centre, about."""
        first, second = self.watches
        first = first.seen(level, slope.noise, self._centre)
        if slope.second is not None:
            distance, noise = slope.second
            second = second.seen(-distance, noise, self._centre)
        self.watches = (first, second)
        self.worse = self.worse + 1 if first.behind or second.behind else 0

    def _pace(self, trend: float | None) -> None:
        """Lengthen the step where the pool gets better, shorten it where it gets worse."""
        # Of halves whose distances differ by N(0, sd^2) the mean |difference| / 2 is the noise.
        spread = math.sqrt(2 * math.pi) * self.watches[0].noise
        if trend is None or not spread > 0:
            return
        sure = max(abs(trend) / spread - DOUBT, 0.0)
        by = math.tanh(sure) * min(1.0, 2 * self.space.renewed * self._age)
        by *= GROW if trend > 0 else -SHRINK
        self.log_step = min(max(self.log_step + by, SHORTEST), LONGEST)

    def _go_back(self) -> None:
        """To where the metric was best that is worse now, the reward if both are."""
        self.blamed = next(i for i, watch in enumerate(self.watches) if watch.behind)
        there = self.watches[self.blamed].theta
        self.returns, self.worse = self.returns + 1, 0
        self.watches = tuple(watch.again() for watch in self.watches)  # type: ignore[assignment]
        self._mean = there.clone()  # type: ignore[union-attr]
        self.halve()
        self._begin_at_mean()

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
        scale = (self._second / (1 - second**self._age)).sqrt() + 1e-12
        self._mean = self._centre + step / self.share * self._first / scale
        self._average = self._average + 4 / (self.steps + 3) * (self._mean - self._average)

    def halve(self) -> None:
        """Halve the step."""
        self.damp(0.5)

    def damp(self, factor: float) -> None:
        """Multiply the step."""
        self.log_step += math.log(factor)

    def _begin_at_mean(self) -> None:
        self._average = self._mean.clone()
        self._go_on_from_mean()

    def _go_on_from_mean(self) -> None:
        self._centre = self._mean.clone()
        self._first = torch.zeros_like(self._mean)
        self._second = torch.zeros_like(self._mean)
        self._age = 0

    def _tensors(self) -> dict[str, Tensor]:
        found = {"average": self._average, "centre": self._centre}
        found |= {"first": self._first, "second": self._second}
        found |= {f"best {i}": w.theta for i, w in enumerate(self.watches) if w.theta is not None}
        return {name: tensor.clone() for name, tensor in found.items()}

    def _scalars(self) -> dict[str, Any]:
        names = ("log_step", "steps", "returns", "worse")
        found: dict[str, Any] = {name: getattr(self, name) for name in names}
        # JSON has no NaN and no infinity.
        found |= {"norm": None if math.isnan(self.norm) else self.norm, "age": self._age}
        return found | {
            f"watch {i}": [w.best if w.best > -math.inf else None, w.noise, w.behind]
            for i, w in enumerate(self.watches)
        }

    def _restore(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        self._average, self._centre = tensors["average"].clone(), tensors["centre"].clone()
        self._first, self._second = tensors["first"].clone(), tensors["second"].clone()
        self.log_step, self._age = float(scalars["log_step"]), int(scalars["age"])
        self.steps, self.returns, self.worse = (
            int(scalars[name]) for name in ("steps", "returns", "worse")
        )
        norm = scalars["norm"]
        self.norm = math.nan if norm is None else float(norm)
        self.watches = (_watch(0, tensors, scalars), _watch(1, tensors, scalars))


def _watch(index: int, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> Watch:
    best, noise, behind = scalars[f"watch {index}"]
    best = -math.inf if best is None else float(best)
    return Watch(tensors.get(f"best {index}"), best, float(noise), bool(behind))
