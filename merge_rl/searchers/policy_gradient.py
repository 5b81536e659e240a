"""Policy gradient over theta: a Gaussian policy, antithetic pairs, batch advantages, Adam.

Li et al., 2026 (arXiv:2607.02291, section 4.3), with the mean as a free vector or from EMANet.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from merge_rl.config import SearchConfig
from merge_rl.core.policy import (
    SHAPINGS,
    antithetic_normal,
    clipped_policy_loss,
    gaussian_log_prob,
    keep_top_fraction,
    plain_normal,
)
from merge_rl.errors import ConfigError, UnknownNameError
from merge_rl.rng import derive_seed, stream
from merge_rl.searchers import base as population
from merge_rl.searchers.base import SearchSpace
from merge_rl.searchers.natural_gradient import NaturalGradient

POLICIES = ("direct", "mlp")
RATE = 0.7  # Adam's, in theta units: about the step of one round


class DirectMean(nn.Module):
    """The mean of theta as a free vector (D,), 0 at first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(dim, dtype=torch.float64))

    def forward(self) -> Tensor:
        """The mean (D,) float64."""
        return self.value

    @property
    def offset(self) -> nn.Parameter:
        """What moves the mean as a whole."""
        return self.value

    @property
    def reach(self) -> float:
        """How far a first Adam step of 1 moves each theta."""
        return 1.0


class EMANet(nn.Module):
    """The mean of theta from a 3-layer MLP on a learnable embedding, as in the paper.

    The last layer starts at 0, so that the search starts where the direct one does.
    """

    def __init__(self, dim: int, generator: torch.Generator, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(width, generator=generator, dtype=torch.float64))
        hidden = [_blank_linear(width, width) for _ in range(2)]
        self.hidden = nn.ModuleList(hidden)
        self.last = _blank_linear(width, dim)
        with torch.no_grad():
            for layer in hidden:
                draw = torch.randn(width, width, generator=generator, dtype=torch.float64)
                layer.weight.copy_(draw * math.sqrt(2 / width))
                layer.bias.zero_()
            self.last.weight.zero_()
            self.last.bias.zero_()

    def forward(self) -> Tensor:
        """The mean (D,) float64."""
        out: Tensor = self.last(self._activations())
        return out

    def _activations(self) -> Tensor:
        x: Tensor = self.embedding
        for layer in self.hidden:
            x = torch.relu(layer(x))
        return x

    @property
    def offset(self) -> nn.Parameter:
        """What moves the mean as a whole."""
        return self.last.bias

    @property
    def reach(self) -> float:
        """How far a first Adam step of 1 moves each theta: all weights of the last layer move."""
        return 1.0 + float(self._activations().detach().abs().sum())


def make_mean(policy: str, dim: int, seed: int) -> DirectMean | EMANet:
    """The network that gives the policy's mean: "direct" or "mlp"."""
    if policy == "direct":
        return DirectMean(dim)
    if policy == "mlp":
        return EMANet(dim, stream(seed, "search", "emanet"))
    raise UnknownNameError("policy", policy, POLICIES)


class PolicyGradientFamily:
    """Makes the policy gradient with the update that a config names: "natural" or "adam".

    Where it names none: Adam for a policy that is a network, the natural gradient otherwise.
    """

    def __call__(
        self, config: SearchConfig, space: SearchSpace, seed: int
    ) -> NaturalGradient | PolicyGradient:
        """A searcher of this space."""
        if config.policy not in POLICIES:
            raise UnknownNameError("policy", config.policy, POLICIES)
        update = config.update or ("adam" if config.policy == "mlp" else "natural")
        if update == "adam":
            return PolicyGradient(config, space, seed)
        if config.policy != "direct":
            raise ConfigError(
                f"the natural update needs the policy 'direct', got {config.policy!r}"
            )
        return NaturalGradient(config, space, seed)

    def population_of(self, config: SearchConfig) -> int:
        """Candidates a round: the setting, 16 if unset; a gradient needs at least 2."""
        return population.parallel(config)


policy_gradient = PolicyGradientFamily()


class PolicyGradient:
    """Searcher whose proposals are draws of Normal(mean, std^2) and whose mean climbs the reward.

    Every round's draws come from a stream of their own, named by the round: what is asked depends
    on the seed and on what was told, never on how often `ask` was called.
    """

    def __init__(self, config: SearchConfig, space: SearchSpace, seed: int) -> None:
        dim = space.dim
        self.config, self.dim, self.seed = config, dim, seed
        self.population = population.parallel(config)
        self.round_index = 0
        self.damping = 1.0  # shrinks the step where the pool lags behind the policy
        self._net = make_mean(config.policy, dim, seed)
        log_std = torch.full((dim,), math.log(config.std), dtype=torch.float64)
        self._log_std = nn.Parameter(log_std, requires_grad=config.learn_std)
        # Divided by the reach, the rate is in theta units for either network.
        rate = RATE if config.learning_rate is None else config.learning_rate
        mean_rate = rate / self._net.reach
        self._optimizer = torch.optim.Adam(
            [
                {"params": list(self._net.parameters()), "rate": mean_rate},
                {"params": [self._log_std], "rate": config.std_learning_rate},
            ],
            lr=rate,
            betas=config.betas,
            foreach=False,
        )

    @property
    def mean(self) -> Tensor:
        """Policy mean (D,) float64."""
        value: Tensor = self._net()
        return value.detach().clone()

    @property
    def done(self) -> bool:
        """Never: there is always another round."""
        return False

    @property
    def finalists(self) -> dict[str, Tensor]:
        """The policy mean."""
        return {"mean": self.mean}

    @property
    def std(self) -> Tensor:
        """Standard deviation (D,) of this round's draws, with the schedule applied."""
        return (self._log_std.detach() + math.log(self._decay())).exp()

    def ask(self) -> Tensor:
        """Candidates (P, D) float64: mean + std z, in antithetic pairs if the settings say so."""
        generator = stream(self.seed, "search", "ask", self.round_index)
        draw = antithetic_normal if self.config.antithetic else plain_normal
        return self.mean + self.std * draw(self.population, self.dim, generator)

    def tell(self, thetas: Tensor, rewards: Tensor) -> None:
        """One policy-gradient update from rewards (P,) of thetas (P, D); NaN ranks last."""
        advantages = SHAPINGS[self.config.shaping](rewards)
        if bool((advantages != 0).any()):
            kept = keep_top_fraction(advantages, self.config.top_fraction)
            self._update(thetas[kept], advantages[kept])
        self.round_index += 1

    def _update(self, thetas: Tensor, advantages: Tensor) -> None:
        decay = self._decay()
        for group in self._optimizer.param_groups:
            group["lr"] = group["rate"] * decay * self.damping
        old = gaussian_log_prob(thetas, self.mean, self.std)
        for _ in range(self.config.epochs):
            std = (self._log_std + math.log(decay)).exp()
            log_prob = gaussian_log_prob(thetas, self._net(), std)
            loss = clipped_policy_loss(log_prob, old, advantages, self.config.clip)
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()

    def damp(self, factor: float) -> None:
        """Multiply the step by `factor` from now on, never below a tenth of the configured one."""
        self.damping = min(1.0, max(0.1, self.damping * factor))

    def halve(self) -> None:
        """Halve the step and the exploration for good."""
        self.damping *= 0.5
        with torch.no_grad():
            self._log_std.sub_(math.log(2))

    def recenter(self, theta: Tensor) -> None:
        """Move the policy mean to theta (D,), where samples were finite, and forget momentum."""
        self._optimizer.state.clear()
        with torch.no_grad():
            self._net.offset.add_(theta - self.mean)

    def _decay(self) -> float:
        # The schedule stops at a floor: a search that goes on for long must not freeze.
        return max(self.config.decay**self.round_index, self.config.min_decay)

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name and, under "scalars", numbers."""
        tensors = {f"mean.{k}": v.clone() for k, v in self._net.state_dict().items()}
        tensors["log_std"] = self._log_std.detach().clone()
        for index, slots in self._optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{k}": torch.as_tensor(v).clone() for k, v in slots.items()}
        scalars = {
            "round_index": self.round_index,
            "damping": self.damping,
            "seed_check": derive_seed(self.seed, "search"),
        }
        return {"tensors": tensors, "scalars": scalars}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; ConfigError if it belongs to another seed."""
        tensors, scalars = state["tensors"], state["scalars"]
        if scalars["seed_check"] != derive_seed(self.seed, "search"):
            raise ConfigError("the saved search belongs to another seed")
        self.round_index, self.damping = int(scalars["round_index"]), float(scalars["damping"])
        mean = {k.removeprefix("mean."): v for k, v in tensors.items() if k.startswith("mean.")}
        self._net.load_state_dict(mean)
        with torch.no_grad():
            self._log_std.copy_(tensors["log_std"])
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("adam."):
                _, index, slot = key.split(".")
                slots.setdefault(int(index), {})[slot] = value.clone()
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": slots, "param_groups": groups})


def _blank_linear(inputs: int, outputs: int) -> nn.Linear:
    # Values are set by the caller: the usual ones would be drawn from the global generator.
    blank: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, inputs, outputs, dtype=torch.float64
    )
    return blank
