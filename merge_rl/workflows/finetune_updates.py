"""How kept rollouts become gradients: policy gradient, or the family's own training loss."""

from __future__ import annotations

from collections.abc import Callable

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
from merge_rl.workflows.finetune_kept import Kept, Share, Watched
from merge_rl.workflows.learner import Learner
from merge_rl.workflows.policy_rollout import PolicyRollout


def _alone(watched: Watched) -> dict[str, float]:
    return watched.means()


class Update:
    """What both kinds of updates have of the other processes: by default there are none."""

    share = Share()
    means: Callable[[Watched], dict[str, float]] = staticmethod(_alone)  # over all processes
    between: Callable[[], None] = staticmethod(lambda: None)  # before each pass; may raise


class PolicyGradient(Update):
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
        for part, _ in self.share.parts(kept, self.settings.micro_batch):
            actions = self.rollout.replay(part.noise, part.labels)
            self._stored.append([_moved(action, "cpu") for action in actions])

    def gradients(self, kept: Kept, _epoch: int) -> dict[str, float]:
        """Add the gradients of the loss over all kept rollouts; its means."""
        watched = Watched()
        parts = self.share.parts(kept, self.settings.micro_batch)
        for i, (part, count) in enumerate(parts):
            stored = self._stored[i] if self._stored else None
            actions = stored or self.rollout.replay(part.noise, part.labels)
            for j, action in enumerate(actions):
                self.between()
                last = i + 1 == len(parts) and j + 1 == len(actions)
                with self.learner.passing(last=last):
                    share = count / (len(kept) * len(actions))
                    self._step(part, action, share, watched)
        return self.means(watched)

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
            len(part) if share else 0, loss=float(found.loss.detach()), ratio_mean=found.ratio,
            clip_fraction=found.clipped, approx_kl=found.old_kl, **extra,
        )  # fmt: skip


class RejectionSampling(Update):
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
                for part, _ in self.share.parts(kept, self.settings.micro_batch)
            ]

    def gradients(self, kept: Kept, epoch: int) -> dict[str, float]:
        """Add the gradients of the loss over all kept samples; its mean."""
        watched, draws = Watched(), self.settings.noise_draws
        parts = self.share.parts(kept, self.settings.micro_batch)
        for i, (part, count) in enumerate(parts):
            for draw in range(draws):
                self.between()
                names = ("rejection", kept.step, epoch, draw)
                with self.learner.passing(last=i + 1 == len(parts) and draw + 1 == draws):
                    loss = self._loss(self._samples[i], part, names)
                    (loss * (count / (len(kept) * draws))).backward()  # type: ignore[no-untyped-call]
                watched.add(len(part) if count else 0, loss=float(loss.detach()))
        return self.means(watched)

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
