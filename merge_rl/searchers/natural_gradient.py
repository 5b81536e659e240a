"""Policy gradient in the natural metric: steps that do not depend on the units of theta.

For a Gaussian policy Normal(mean, std²) the gradient of E[A] in the mean is E[A z] / std with
z = (theta - mean) / std, and its Fisher information is 1 / std²: the natural gradient is
std · E[A z] (Amari, 1998; as a search, Wierstra et al., 2014, arXiv:1106.4487). With advantages of
unit variance, E[A z] has at most unit length on a linear reward, so that a step is never longer
than the exploration it is based on.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merge_rl.config import SearchConfig
from merge_rl.core.policy import SHAPINGS, keep_top_fraction, orthogonal_pairs, plain_normal
from merge_rl.errors import ConfigError
from merge_rl.rng import derive_seed, stream
from merge_rl.searchers import base as population
from merge_rl.searchers.base import SearchSpace

STEP = 1.0  # of the policy's std, along a gradient without noise
WIDEST = 8.0  # times the configured exploration and, as a divisor, the narrowest
TAIL = 3.0  # of the running average: mean t weighs as (1 + TAIL) / (t + TAIL)


SMALL_DIM, PER_DIRECTION, MOST = 128, 16, 128  # up to which, and how, the population stays small
STEEP = 8.0  # dimensions for each direction that is looked along, up to which steps keep STEP
FREE_EACH = 16  # coefficients of a group, up to which the exploration keeps its width


class Scaled(NamedTuple):
    """Population and factors for a space of many dimensions; 16 and 1 where there are few."""

    population: int
    step: float  # factor of STEP
    exploration: float  # factor of the width along one coordinate


def scaled_to(dim: int, free_each: int, population: int | None = None) -> Scaled:
    """Settings for theta of `dim` values, of which `free_each` move the same weights.

    A draw lies sqrt(D) widths from its mean, and moves weights by sqrt(`free_each`) of them: the
    width shrinks so that this stays what it is for 16. A gradient from N < D directions at right
    angles is sqrt(D / N) too long, since each stands for D / N others, and points sqrt(N / D) of
    its length uphill: a step that keeps to what was seen shrinks with N / D.
    """
    many = min(MOST, 2 * math.ceil(dim / PER_DIRECTION))
    own = 16 if dim <= SMALL_DIM else many
    count = own if population is None else population
    step = min(1.0, STEEP * (count // 2) / dim)
    return Scaled(count, step, min(1.0, math.sqrt(FREE_EACH / free_each)))


class NaturalGradient:
    """Searcher that proposes what lies about a std from its mean, and whose mean climbs the reward.

    Proposals are antithetic pairs along random directions at right angles, a policy that is uniform
    on a sphere; or draws of Normal(mean, std²) where `antithetic` is off.

    Exploration, and the step with it, shrinks linearly with the share of the budget that is spent,
    down to `min_decay`. Beside that it grows while successive gradients agree, and shrinks where
    they contradict each other: the momentum is a sum of them, whose length is compared with what
    it would be if they had nothing to do with each other (cumulative step-size adaptation, Hansen
    & Ostermeier, 2001, Evolutionary Computation 9(2), section 4).

    Every round's draws come from a stream of their own: what is asked depends on the seed and on
    what was told, never on how often `ask` was called.

    Reported beside the mean is its running average with the weights of polynomial decay (Shamir &
    Zhang, 2013, arXiv:1212.1824, section 4), which forgets the beginning.
    """

    def __init__(self, config: SearchConfig, space: SearchSpace, seed: int) -> None:
        self.config, self.space, self.seed = config, space, seed
        self.population = population.parallel(config)
        self.round_index = self.told = self.updates = 0
        self.damping = 1.0  # shrinks the step where the pool lags behind the policy
        self._mean = space.origin.clone()
        self._average = space.origin.clone()
        self._momentum = space.origin.clone()
        self._log_std = torch.full_like(space.origin, math.log(config.std))
        self._power = 0.0  # running mean of the gradients' squared lengths, with the same memory
        self._log_width = 0.0  # what agreement of gradients has done to the exploration

    @property
    def mean(self) -> Tensor:
        """Policy mean (D,) float64."""
        return self._mean.clone()

    @property
    def done(self) -> bool:
        """Never: there is always another round."""
        return False

    @property
    def finalists(self) -> dict[str, Tensor]:
        """The policy mean and its running average."""
        return {"mean": self.mean, "average": self._average.clone()}

    @property
    def std(self) -> Tensor:
        """Standard deviation (D,) of this round's draws, with the schedule applied."""
        left = 1 - self.told / self.space.evaluations
        width = math.exp(self._log_width) * max(left, self.config.min_decay)
        return self._log_std.exp() * width

    def ask(self) -> Tensor:
        """Candidates (P, D) float64: mean + std z, in orthogonal pairs if antithetic."""
        generator = stream(self.seed, "search", "ask", self.round_index)
        draw = orthogonal_pairs if self.config.antithetic else plain_normal
        return self._mean + self.std * draw(self.population, len(self._mean), generator)

    def tell(self, thetas: Tensor, rewards: Tensor) -> None:
        """One update from rewards (P,) of thetas (P, D); NaN ranks last."""
        advantages = SHAPINGS[self.config.shaping](rewards)
        std = self.std
        if bool((advantages != 0).any()):
            kept = keep_top_fraction(advantages, self.config.top_fraction)
            self._update((thetas[kept] - self._mean) / std, advantages[kept], std)
        self.round_index += 1
        self.told += len(thetas)
        weight = (1 + TAIL) / (self.round_index + TAIL)
        self._average = self._average + weight * (self._mean - self._average)

    def _update(self, z: Tensor, advantages: Tensor, std: Tensor) -> None:
        memory = self.config.momentum
        gradient = (advantages[:, None] * z).mean(0)
        self._momentum = memory * self._momentum + (1 - memory) * gradient
        self.updates += 1
        # The first averages would be too small by what 0 still weighs in them.
        smooth = self._momentum / (1 - memory**self.updates)
        step = STEP if self.config.learning_rate is None else self.config.learning_rate
        self._mean = self._mean + step * self.damping * std * smooth
        self._adapt(gradient, smooth)
        if self.config.learn_std:
            # The natural gradient in log std is half of E[A (z² - 1)].
            change = (advantages[:, None] * (z.square() - 1)).mean(0)
            self._log_std = self._log_std + 0.5 * self.config.std_learning_rate * change

    def _adapt(self, gradient: Tensor, smooth: Tensor) -> None:
        """Widen the exploration where gradients agree, narrow it where they do not."""
        memory, count = self.config.momentum, self.updates
        fresh = float(gradient.square().sum())
        self._power = fresh if count == 1 else memory * self._power + (1 - memory) * fresh
        if count == 1 or memory == 0 or self._power == 0:
            return
        # Squared length of a mean with these weights, if gradients were independent, of one's.
        share = (1 - memory) * (1 + memory**count) / ((1 + memory) * (1 - memory**count))
        length = math.sqrt(float(smooth.square().sum()) / (share * self._power))
        length /= _mean_length(len(self._mean))
        width = self._log_width + self.config.width_rate * (length - 1)
        self._log_width = min(max(width, -math.log(WIDEST)), math.log(WIDEST))

    def damp(self, factor: float) -> None:
        """Multiply the step by `factor` from now on, never below a tenth of the configured one."""
        self.damping = min(1.0, max(0.1, self.damping * factor))

    def halve(self) -> None:
        """Halve the exploration, and the step with it, for good."""
        self._log_std = self._log_std - math.log(2)

    def recenter(self, theta: Tensor) -> None:
        """Go on from theta (D,) and forget the momentum; before the first round, begin there.

        A wider exploration is forgotten too: it led to where samples were not finite.
        """
        self._mean = theta.clone()
        self._log_width = min(self._log_width, 0.0)
        self._momentum = torch.zeros_like(theta)
        self.updates = 0
        if self.round_index == 0:
            self._average = theta.clone()

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name and, under "scalars", numbers."""
        tensors = {
            "mean": self._mean, "average": self._average,
            "momentum": self._momentum, "log_std": self._log_std,
        }  # fmt: skip
        scalars = {
            "round_index": self.round_index, "told": self.told, "updates": self.updates,
            "damping": self.damping, "power": self._power, "log_width": self._log_width,
            "seed_check": derive_seed(self.seed, "search"),
        }  # fmt: skip
        return {"tensors": {k: v.clone() for k, v in tensors.items()}, "scalars": scalars}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; ConfigError if it belongs to another seed."""
        tensors, scalars = state["tensors"], state["scalars"]
        if scalars["seed_check"] != derive_seed(self.seed, "search"):
            raise ConfigError("the saved search belongs to another seed")
        self.round_index, self.told = int(scalars["round_index"]), int(scalars["told"])
        self.updates, self.damping = int(scalars["updates"]), float(scalars["damping"])
        self._power, self._log_width = float(scalars["power"]), float(scalars["log_width"])
        self._mean, self._average = tensors["mean"].clone(), tensors["average"].clone()
        self._momentum, self._log_std = tensors["momentum"].clone(), tensors["log_std"].clone()


def _mean_length(dim: int) -> float:
    """E|x| / sqrt(dim) of a normal vector, to 2e-3 (Hansen, 2016, arXiv:1604.00772, page 28)."""
    return 1 - 1 / (4 * dim) + 1 / (21 * dim**2)
