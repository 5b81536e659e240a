"""The network in training: optimizer, moving average, and the one place where weights change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from merge_rl.config.finetune import UpdateConfig
from merge_rl.models.lora import plain_state_dict

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
        self.updates = 0
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=settings.learning_rate, betas=settings.betas,
            weight_decay=settings.weight_decay,
        )  # fmt: skip
        self.average = network
        if settings.ema_decay:
            self.average = copy.deepcopy(network).requires_grad_(False)

    def begin(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def gradient_norm(self) -> float:
        """Norm of all gradients, which are clipped to the settings' bound on the way."""
        parameters = list(self.trained.values())
        return float(nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm))

    def apply(self) -> None:
        """One update of weights and moving average from the gradients, which must be finite."""
        settings = self.settings
        self.updates += 1
        warm = min(1.0, self.updates / max(settings.warmup_steps, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * warm
        self.optimizer.step()
        normalize = getattr(self.network, "normalize_weights", None)
        if normalize is not None:
            normalize()
        if self.average is self.network:
            return
        # A young average follows the weights closely, or it would be the start for long.
        decay = min(settings.ema_decay, self.updates / (self.updates + 9))
        with torch.no_grad():
            mine = dict(self.average.named_parameters())
            for name, parameter in self.trained.items():
                mine[name].lerp_(parameter, 1 - decay)

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
