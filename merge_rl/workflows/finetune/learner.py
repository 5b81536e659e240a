"""The network in training: where its weights change, and its way to a resume point."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from merge_rl.config import UpdateConfig
from merge_rl.core.sampling.compatibility import prediction_of
from merge_rl.errors import ConfigError
from merge_rl.models import plain_state_dict
from merge_rl.storage.files import below, counts_of
from merge_rl.workflows.rewards import Pool, RewardSum

Wrap = Callable[[nn.Module], nn.Module]
"""Puts a network into what trains it, such as one that averages gradients over processes."""


class Learner:
    """A network with float32 weights, changed in place by `apply` and by nothing else.

    Everything before `apply` (rollouts, losses, gradients) leaves the state as it is, so that a
    step that is given up, or interrupted, costs nothing.

    Args:
        network: in evaluation mode, on its device; parameters with gradients are trained.
        settings: optimizer and moving average.
        wrap: what losses are computed through.
    """

    def __init__(
        self, network: nn.Module, settings: UpdateConfig, wrap: Wrap = lambda network: network
    ) -> None:
        self.network, self.settings = network, settings
        self.trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
        self.policy = wrap(network)
        if prediction_of(self.policy) != prediction_of(network):
            raise ConfigError(
                f"expected wrap= to keep the network's attribute `prediction`, "
                f"{prediction_of(network)!r}, got {prediction_of(self.policy)!r}"
            )
        self.updates = 0
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=settings.learning_rate, betas=settings.betas,
            weight_decay=settings.weight_decay,
        )  # fmt: skip
        self.average = network
        if settings.ema_decay:
            self.average = copy.deepcopy(network).requires_grad_(False)

    @property
    def averages(self) -> bool:
        """Whether there is a moving average beside the weights."""
        return self.average is not self.network

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """A network with the moving average of the weights, or the weights where there is none."""
        yield self.average

    def passing(self, *, last: bool) -> AbstractContextManager[None]:
        """Around every forward and backward pass of a batch.

        Gradients that are averaged over processes are so once, after the last one.
        """
        quiet: Callable[[], AbstractContextManager[None]] | None = getattr(
            self.policy, "no_sync", None
        )
        return nullcontext() if last or quiet is None else quiet()

    def begin(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def gradient_norm(self) -> float:
        """Norm of all gradients, which are clipped to the settings' bound on the way."""
        parameters = list(self.trained.values())
        return float(nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm))

    def apply(self) -> None:
        """One update of weights and moving average from the gradients, which must be finite."""
        self._update(self.network)
        if self.average is self.network:
            return
        decay = self._decay()
        with torch.no_grad():
            mine = dict(self.average.named_parameters())
            for name, parameter in self.trained.items():
                mine[name].lerp_(parameter, 1 - decay)

    def _update(self, network: nn.Module) -> None:
        self.updates += 1
        warm = min(1.0, self.updates / max(self.settings.warmup_steps, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * warm
        self.optimizer.step()
        normalize = getattr(network, "normalize_weights", None)
        if normalize is not None:
            normalize()

    def _decay(self) -> float:
        # A young average follows the weights closely, or it would be the start for long.
        return min(self.settings.ema_decay, self.updates / (self.updates + 9))

    def weights(self, *, average: bool) -> dict[str, Tensor]:
        """Copies of the weights or of their average, float32 on the CPU, with official names."""
        network = self.average if average else self.network
        plain = plain_state_dict(network)
        return {name: tensor.detach().float().cpu().clone() for name, tensor in plain.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """What is trained, its average and the optimizer's moments, by name."""
        state = {f"weights.{name}": p.detach() for name, p in self.trained.items()}
        if self.average is not self.network:
            mine = dict(self.average.named_parameters())
            state |= {f"average.{name}": mine[name].detach() for name in self.trained}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"optimizer.{key}.{name}"] = value
        return state

    def load_state_dict(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Go on from a saved state; KeyError or RuntimeError for one of another network."""
        self.updates = updates
        mine = dict(self.average.named_parameters())
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state[f"weights.{name}"])
                if self.average is not self.network:
                    mine[name].copy_(state[f"average.{name}"])
                if not updates:
                    continue
                self.optimizer.state[parameter] = {
                    key: self._placed(key, state[f"optimizer.{key}.{name}"], parameter)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }

    @staticmethod
    def _placed(key: str, value: Tensor, parameter: Tensor) -> Tensor:
        # The count of steps stays on the CPU, as the optimizer made it.
        return value.clone() if key == "step" else value.to(parameter.device, copy=True)


def trainable(network: nn.Module) -> nn.Module:
    """The network with gradients for all weights that a sample depends on.

    Constant tables that files store as parameters stay as they are, and so do modules of the
    training loss alone.
    """
    fixed: tuple[str, ...] = tuple(getattr(network, "fixed_names", ()))
    spare: tuple[str, ...] = tuple(getattr(network, "loss_modules", ()))
    for name, parameter in network.named_parameters():
        apart = name in fixed or name.partition(".")[0] in spare
        parameter.requires_grad_(not apart)
    return network


@dataclass(frozen=True, eq=False)
class LoopState:
    """Where a run is, beside its weights: replaced as a whole, never altered."""

    step: int = 0  # finished steps, skipped ones among them
    images: int = 0  # generated for training: rollouts and pools
    pool: Pool | None = None
    pool_step: int = -1  # the step that the pool was brought up to date at
    failures: int = 0  # skipped steps in a row, up to now
    skipped: int = 0  # skipped steps of the whole run

    def advanced(self, images: int) -> LoopState:
        """The state after a finished step that generated so many images."""
        return dataclasses.replace(
            self, step=self.step + 1, failures=0, images=self.images + images
        )

    def passed_over(self) -> LoopState:
        """The state after a skipped step."""
        return dataclasses.replace(
            self, step=self.step + 1, failures=self.failures + 1, skipped=self.skipped + 1
        )

    def before_failures(self) -> LoopState:
        """The state before the consecutive skipped steps."""
        row = self.failures
        return dataclasses.replace(
            self, step=self.step - row, failures=0, skipped=self.skipped - row
        )


def pack_state(
    state: LoopState, learner: Learner, reward: RewardSum
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and plain values of a resume point: with the settings all that a run depends on.

    No generator is among them: every draw follows from the seed, the step and the image.
    """
    tensors = {f"learner.{k}": v for k, v in learner.state_dict().items()}
    values: dict[str, Any] = {
        item.name: getattr(state, item.name)
        for item in dataclasses.fields(state) if item.name != "pool"
    }  # fmt: skip
    if state.pool is not None:
        tensors |= state.pool.state_dict()
        tensors |= {f"reward.{k}": v for k, v in reward.state_dict(state.pool).items()}
    return tensors, {**values, "updates": learner.updates}


def unpack_state(
    tensors: Mapping[str, Tensor], values: Mapping[str, Any], learner: Learner, reward: RewardSum
) -> LoopState:
    """The state of a resume point; the learner's weights and optimizer are set to it.

    KeyError, TypeError, ValueError or RuntimeError for a resume point of something else.
    """
    counts = counts_of(values, "step", "images", "failures", "skipped", "updates")
    counts |= counts_of(values, "pool_step", least=-1)
    pool = None
    if "pool.features" in tensors:
        pool = Pool.restored(tensors)
        reward.load_state_dict(pool, below(tensors, "reward."))
    learner.load_state_dict(below(tensors, "learner."), counts.pop("updates"))
    return LoopState(pool=pool, **counts)
