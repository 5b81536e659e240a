"""Denoising as a policy: every noisy step of an SDE is a Gaussian, and its draw an action.

A rollout is gone through again, step by step, at weights that have moved since: of it are kept the
states that it passed, what each step drew there and how likely that was. One step at a time needs
the network's activations of that step alone, so that memory does not grow with the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from merge_rl.core.network import against
from merge_rl.core.policy import clipped_policy_loss
from merge_rl.core.sampling.paths import Path
from merge_rl.core.sampling.sde import SDE, Gaussian, NoiseSource, noisy_step, step_log_prob
from merge_rl.errors import ConfigError
from merge_rl.interfaces import Denoiser


@dataclass(frozen=True)
class WindowedSDE:
    """An SDE that draws noise in a window of its steps alone; elsewhere it takes those of an ODE.

    Few noisy steps leave a rollout close to the ODE's, and they alone have to be trained (as in
    MixGRPO, Li et al., 2025, arXiv:2507.21802).

    Args:
        noisy: the SDE, followed within the window.
        still: the same steps without noise, followed before and after it.
        first, stop: the window is steps first..stop-1.
    """

    noisy: SDE
    still: SDE
    first: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.stop <= self.noisy.num_noisy:
            raise ConfigError(
                f"expected a window within noisy steps 0..{self.noisy.num_noisy - 1}, got steps "
                f"{self.first}..{self.stop - 1}"
            )

    def _at(self, index: int) -> SDE:
        return self.noisy if self.first <= index < self.stop else self.still

    @property
    def num_noisy(self) -> int:
        """Steps before the last one, within the window or not."""
        return self.noisy.num_noisy

    def start(self, noise: Tensor) -> Tensor:
        """The state that a rollout begins with, from unit noise."""
        return self.noisy.start(noise)

    def gaussian(self, index: int, x: Tensor) -> Gaussian:
        """What step `index` draws from at x; its standard deviation is 0 outside of the window."""
        return self._at(index).gaussian(index, x)

    def advance(self, index: int, drawn: Tensor) -> Tensor:
        """The end of step `index` after its draw."""
        return self._at(index).advance(index, drawn)

    def last(self, x: Tensor) -> Tensor:
        """Samples from the state after all of these steps."""
        return self.still.last(x)


class Action(NamedTuple):
    """What one noisy step of B images did: enough to ask other weights how likely it is."""

    step: int
    x: Tensor  # (B, ...), where the step began
    drawn: Tensor  # (B, ...), what it drew
    log_prob: Tensor  # (B,) float64, log density of the draw at the weights that drew it


def replay(sde: SDE, noise: Tensor, draw: NoiseSource) -> list[Action]:
    """The actions of the rollout that `solve_sde` makes of the same arguments, in order.

    Steps that add no noise have no density and are left out. Without gradients.
    """
    actions = []
    with torch.no_grad():
        x = sde.start(noise)
        for number in range(sde.num_noisy):
            step = noisy_step(sde, number, x, draw())
            if float(step.std) > 0:
                actions.append(Action(number, x, step.drawn, step.log_prob))
            x = step.x_next
    return actions


Passing = Callable[..., AbstractContextManager[None]]
"""passing(last=...) is around every forward and backward pass; `last` tells the last of all."""


@dataclass(frozen=True, eq=False)
class StillSteps:
    """Steps of a rollout that draw nothing, one after the other: a function of where they begin.

    Its derivative is taken step by step, in the memory of one of them.
    """

    sde: SDE
    steps: range
    states: list[Tensor]  # where each step begins, and the end of the last one

    @classmethod
    def through(cls, sde: SDE, first: int, stop: int, x: Tensor) -> StillSteps:
        """Steps first..stop-1 from x (B, ...) on; `sde.num_noisy` is the number of the last one."""
        states = [x]
        with torch.no_grad():
            for index in range(first, stop):
                states.append(still_step(sde, index, states[-1]))
        return cls(sde, range(first, stop), states)

    @property
    def end(self) -> Tensor:
        """The state after all of them, (B, ...)."""
        return self.states[-1]

    def pull(self, cotangent: Tensor, passing: Passing, *, last: bool = False) -> Tensor:
        """Add the gradient of <end, cotangent> to the weights'; that of the first state."""
        for index, x in zip(reversed(self.steps), reversed(self.states[:-1]), strict=True):
            start = x.detach().requires_grad_(True)
            with passing(last=last and index == self.steps[0]):
                made = still_step(self.sde, index, start)
                against(made, cotangent).backward()  # type: ignore[no-untyped-call]
            cotangent = torch.zeros_like(x) if start.grad is None else start.grad
        return cotangent


def still_step(sde: SDE, index: int, x: Tensor) -> Tensor:
    """The end of a step that adds no noise, from x (B, ...); differentiable in the weights."""
    if index == sde.num_noisy:
        return sde.last(x)
    return sde.advance(index, sde.gaussian(index, x).mean)


class StepLoss(NamedTuple):
    """Loss of one step, and what to watch; all means over the B images."""

    loss: Tensor  # (), with gradients
    ratio: float
    clipped: float  # share of ratios out of 1 - clip .. 1 + clip
    old_kl: float  # KL(old || new) of the step, estimated from the draws, never negative
    reference_kl: float  # KL(new || frozen reference) of the step, exact


def step_loss(
    sde: SDE,
    action: Action,
    advantages: Tensor,
    *,
    clip: float,
    per_dimension: bool = False,
    kl_weight: float = 0.0,
    reference: SDE | None = None,
) -> StepLoss:
    """Clipped policy loss of one step at the present weights (arXiv:2607.02291, equation 6).

        - mean min(r A, clip(r, 1 - c, 1 + c) A) + kl_weight KL(new || reference)

    with r = exp(log_prob - old log_prob) of the whole step, or with `per_dimension` its D-th root,
    D the number of values of an image: the scale that published clips of 1e-4 belong to.

    Args:
        sde: of the network in training; gradients flow into its weights.
        action: of B images, one step.
        advantages: (B,), higher is better.
        clip: c > 0.
        reference: the same SDE of a frozen network, where kl_weight is not 0. Both steps have one
            standard deviation s, so that their KL is |mean - mean_ref|^2 / (2 s^2).
    """
    mean, std = sde.gaussian(action.step, action.x)
    size = action.x[0].numel() if per_dimension else 1
    log_prob = step_log_prob(action.drawn, mean, std) / size
    old = action.log_prob / size
    loss = clipped_policy_loss(log_prob, old, advantages.to(log_prob), clip)
    reference_kl = 0.0
    if reference is not None and kl_weight:
        with torch.no_grad():
            anchor = reference.gaussian(action.step, action.x).mean
        apart = ((mean - anchor).double() / std.double()).flatten(1).square().sum(1) / 2
        loss = loss + kl_weight * apart.mean() / size
        reference_kl = float(apart.mean().detach())
    shift = (log_prob - old).detach()
    ratio = shift.exp()
    outside = (ratio - 1).abs() > clip
    # E_old[r - 1 - log r] = KL(old || new), and no draw of it is negative (Schulman, 2020).
    return StepLoss(
        loss, float(ratio.mean()), float(outside.double().mean()),
        float((shift.expm1() - shift).mean()), reference_kl,
    )  # fmt: skip


def velocity_loss(
    model: Denoiser, path: Path, data: Tensor, labels: Tensor | None, t: Tensor, noise: Tensor
) -> Tensor:
    """Velocity matching: mean of |v(x_t, t) - dx_t/dt|^2 over all values, ().

        x_t = alpha(t) data + sigma(t) noise,    dx_t/dt = alpha'(t) data + sigma'(t) noise

    (Ma et al., 2024, arXiv:2401.08740, equation 5.) data, noise (B, C, h, w), t (B,) in [0, 1].
    """
    at = t.reshape(-1, *[1] * (data.ndim - 1))
    x = path.alpha(at) * data + path.sigma(at) * noise
    target = path.d_alpha(at) * data + path.d_sigma(at) * noise
    return (model(x, t, labels) - target).square().mean()


def denoising_loss(
    model: Denoiser,
    data: Tensor,
    labels: Tensor | None,
    sigma: Tensor,
    noise: Tensor,
    *,
    sigma_data: float,
) -> Tensor:
    """EDM's: mean of w(sigma) |D(data + sigma noise; sigma) - data|^2 over all values, ().

        w(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2

    (Karras et al., 2022, arXiv:2206.00364, equation 2 and table 1.) data, noise (B, C, h, w),
    sigma (B,) > 0. EDM2's uncertainty head divides it by a learned function of sigma; a network
    that is trained already is at w = 1 for its own unit-variance target, and does without.
    """
    at = sigma.reshape(-1, *[1] * (data.ndim - 1))
    weight = (at.square() + sigma_data**2) / (at * sigma_data).square()
    error = model(data + at * noise, sigma, labels) - data
    return (weight * error.square()).mean()


def log_normal_levels(normal: Tensor, mean: float, std: float) -> Tensor:
    """Noise levels exp(mean + std z) of unit normal z, the training distribution of EDM."""
    return torch.exp(mean + std * normal)


def uniform_times(uniform: Tensor, end: float) -> Tensor:
    """Times in [0, end) from u in [0, 1): a path's velocity may have no limit at t = 1."""
    return uniform * end
