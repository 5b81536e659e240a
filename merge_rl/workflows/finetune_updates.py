"""How kept rollouts become gradients: policy gradient, or the family's own training loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from merge_rl.config.finetune import UpdateConfig
from merge_rl.core.compatibility import VELOCITY, prediction_of
from merge_rl.core.interpolants import make_path
from merge_rl.core.step_policy import Action, step_loss
from merge_rl.core.training_losses import (
    denoising_loss,
    log_normal_levels,
    uniform_times,
    velocity_loss,
)
from merge_rl.interfaces import Denoiser
from merge_rl.rng import stream
from merge_rl.workflows.fast import prepare_network
from merge_rl.workflows.learner import Learner
from merge_rl.workflows.policy_rollout import PolicyRollout


@dataclass(frozen=True, eq=False)
class Kept:
    """Rollouts that an update learns from."""

    noise: Tensor  # (M, C, h, w)
    labels: Tensor  # (M,)
    advantages: Tensor  # (M,)
    rows: Tensor  # (M,) int64, their places among all rollouts of the step
    step: int

    def __len__(self) -> int:
        return len(self.labels)

    def parts(self, size: int) -> Iterator[Kept]:
        """Micro-batches."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Kept(
                self.noise[part], self.labels[part], self.advantages[part], self.rows[part],
                self.step,
            )  # fmt: skip


@dataclass
class Watched:
    """Means over images and steps of what an update did."""

    sums: dict[str, float] = field(default_factory=dict)
    count: float = 0.0

    def add(self, count: int, **values: float) -> None:
        """Values that are means over `count` images."""
        self.count += count
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + count * value

    def means(self) -> dict[str, float]:
        """By name."""
        return {name: total / max(self.count, 1) for name, total in self.sums.items()}


class PolicyGradient:
    """Clipped policy gradient over the noisy steps of rollouts.

    Gradients are taken step by step: one step's activations are held at a time. With one epoch
    a micro-batch's rollout is gone through again when its turn comes, so that no more than its
    own states are held; with several, all are, in main memory, since the weights move between.
    """

    def __init__(
        self, learner: Learner, rollout: PolicyRollout, settings: UpdateConfig,
        reference: nn.Module | None = None,
    ) -> None:  # fmt: skip
        self.learner, self.rollout, self.settings = learner, rollout, settings
        self.policy = prepare_network(learner.policy, rollout.sampler, rollout.device)
        self.reference = reference and prepare_network(reference, rollout.sampler, rollout.device)
        self._stored: list[list[Action]] = []

    def begin(self, kept: Kept) -> None:
        """Before the epochs of a step: go through the rollouts at the weights that made them."""
        self._stored = []
        if self.settings.epochs == 1:
            return
        for part in kept.parts(self.settings.micro_batch):
            actions = self.rollout.replay(part.noise, part.labels)
            self._stored.append([_moved(action, "cpu") for action in actions])

    def gradients(self, kept: Kept, _epoch: int) -> dict[str, float]:
        """Add the gradients of the loss over all kept rollouts; its means."""
        watched = Watched()
        for i, part in enumerate(kept.parts(self.settings.micro_batch)):
            stored = self._stored[i] if self._stored else None
            actions = stored or self.rollout.replay(part.noise, part.labels)
            for action in actions:
                self._step(part, action, len(part) / (len(kept) * len(actions)), watched)
        return watched.means()

    def _step(self, part: Kept, action: Action, share: float, watched: Watched) -> None:
        settings, device = self.settings, self.rollout.device
        anchor = self.rollout.sde(part.labels, self.reference) if self.reference else None
        found = step_loss(
            self.rollout.sde(part.labels, self.policy),
            _moved(action, device),
            part.advantages.to(device),
            clip=settings.clip,
            per_dimension=settings.per_dimension,
            kl_weight=settings.kl_weight,
            reference=anchor,
        )
        (found.loss * share).backward()  # type: ignore[no-untyped-call]
        extra = {"reference_kl": found.reference_kl} if anchor else {}
        watched.add(
            len(part), loss=float(found.loss.detach()), ratio_mean=found.ratio,
            clip_fraction=found.clipped, approx_kl=found.old_kl, **extra,
        )  # fmt: skip


class RejectionSampling:
    """The family's training loss on the samples of the kept rollouts.

    Velocity matching at uniform times for SiT, EDM's weighted denoising at log-normal noise levels
    for EDM2. Every draw follows from the step, the epoch and the image.
    """

    def __init__(
        self, learner: Learner, rollout: PolicyRollout, settings: UpdateConfig, seed: int
    ) -> None:
        self.learner, self.rollout, self.settings, self.seed = learner, rollout, settings, seed
        self.policy = prepare_network(learner.policy, rollout.sampler, rollout.device)
        self._samples: list[Tensor] = []

    def begin(self, kept: Kept) -> None:
        """Make the samples again, at the weights that made them."""
        with torch.no_grad():
            self._samples = [
                self.rollout.latents(part.noise, part.labels).cpu()
                for part in kept.parts(self.settings.micro_batch)
            ]

    def gradients(self, kept: Kept, epoch: int) -> dict[str, float]:
        """Add the gradients of the loss over all kept samples; its mean."""
        watched, draws = Watched(), self.settings.noise_draws
        for i, part in enumerate(kept.parts(self.settings.micro_batch)):
            for draw in range(draws):
                names = ("rejection", kept.step, epoch, draw)
                loss = self._loss(self._samples[i], part, names)
                (loss * (len(part) / (len(kept) * draws))).backward()  # type: ignore[no-untyped-call]
                watched.add(len(part), loss=float(loss.detach()))
        return watched.means()

    def _loss(self, samples: Tensor, part: Kept, names: tuple[str | int, ...]) -> Tensor:
        device, sampler = self.rollout.device, self.rollout.sampler
        noise, normal, uniform, drop = _draws(samples.shape[1:], part.rows, self.seed, names)
        network, labels, data = self.learner.network, part.labels, samples.to(device)
        noise = noise.to(device)
        if prediction_of(network) == VELOCITY:
            rate, null = float(getattr(network, "class_dropout_prob", 0.0)), _null(network)
            if null is not None:
                labels = labels.masked_fill(drop < rate, null)
            path = make_path(sampler.path)
            t = uniform_times(uniform, path.end).to(device)
            return velocity_loss(self.policy, path, data, labels.to(device), t, noise)
        settings = self.settings
        sigma = log_normal_levels(normal, settings.level_mean, settings.level_std).to(device)
        return denoising_loss(
            self.policy, data, labels.to(device), sigma, noise,
            sigma_data=float(getattr(network, "sigma_data", 0.5)),
        )  # fmt: skip


def _null(network: Denoiser | nn.Module) -> int | None:
    null: int | None = getattr(network, "null_label", None)
    return null


def _draws(
    shape: torch.Size, rows: Tensor, seed: int, names: tuple[str | int, ...]
) -> tuple[Tensor, ...]:
    """By the images' places: noise (M, *shape), a unit normal and two uniform numbers (M,)."""
    noise, numbers = [], []
    for row in rows.tolist():
        generator = stream(seed, *names, row)
        noise.append(torch.randn(shape, generator=generator))
        normal = torch.randn([], generator=generator)
        numbers.append(torch.stack([normal, *torch.rand(2, generator=generator)]))
    return torch.stack(noise), *torch.stack(numbers).unbind(1)


def _moved(action: Action, device: str | torch.device) -> Action:
    return Action(
        action.step, action.x.to(device), action.drawn.to(device), action.log_prob.to(device)
    )
