"""How kept rollouts become gradients: policy gradient, or the family's own training loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from merge_rl.config import UpdateConfig
from merge_rl.core.sampling.compatibility import VELOCITY, on_path, prediction_of
from merge_rl.core.sampling.paths import make_path
from merge_rl.core.step_policy import (
    Action,
    StillSteps,
    denoising_loss,
    log_normal_levels,
    step_loss,
    uniform_times,
    velocity_loss,
)
from merge_rl.interfaces import Denoiser
from merge_rl.rng import stream
from merge_rl.workflows.finetune.learner import Learner
from merge_rl.workflows.finetune.rollouts import KeptRollouts, PolicyRollout, ProcessShare
from merge_rl.workflows.rollout import exact_products, prepare_network, pull_back


def _alone(watched: UpdateStats) -> dict[str, float]:
    return watched.means()


class Update:
    """What both kinds of updates have of the other processes: by default there are none."""

    share = ProcessShare()
    means: Callable[[UpdateStats], dict[str, float]] = staticmethod(_alone)  # over all processes
    between: Callable[[], None] = staticmethod(lambda: None)  # before each pass; may raise


class PolicyGradient(Update):
    """Clipped policy gradient over the noisy steps of rollouts.

    Steps that draw nothing (the last one, and those outside of a window) have no density, but what
    they do to the reward depends on the weights all the same. Where the kept rollouts say how the
    reward depends on an image, its derivative goes back through the steps after the last draw, and
    that of a draw's density through those before it: together they are the gradient of the reward.

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

    def begin(self, kept: KeptRollouts) -> None:
        """Before the epochs of a step: go through the rollouts at the weights that made them."""
        self._stored = []
        if self.settings.epochs == 1:
            return
        for part, _ in self.share.parts(kept, self.settings.micro_batch):
            actions = self.rollout.replay(part.noise, part.labels)
            self._stored.append([_moved(action, "cpu") for action in actions])

    def gradients(self, kept: KeptRollouts, _epoch: int) -> dict[str, float]:
        """Add the gradients of the loss over all kept rollouts; its means."""
        watched = UpdateStats()
        parts = self.share.parts(kept, self.settings.micro_batch)
        for i, (part, count) in enumerate(parts):
            stored = self._stored[i] if self._stored else None
            actions = stored or self.rollout.replay(part.noise, part.labels)
            share, end = count / (len(kept) * len(actions)), i + 1 == len(parts)
            for j, action in enumerate(actions):
                last = end and j + 1 == len(actions) and part.pull is None
                before = self._still(part, actions[j - 1] if j else None, action.step)
                with self._pass(last=last):
                    pull = self._step(part, action, share, watched, before)
                if before is not None and len(before.steps):
                    before.pull(pull, self._pass)
            if part.pull is not None:
                self._tail(part, actions[-1], share, end=end)
        return self.means(watched)

    @contextmanager
    def _pass(self, *, last: bool) -> Iterator[None]:
        self.between()
        with self.learner.passing(last=last):
            yield

    def _still(self, part: KeptRollouts, after: Action | None, stop: int) -> StillSteps | None:
        """The steps that draw nothing from an action, or the start, on; None if left out."""
        if part.pull is None:
            return None
        sde, device = self.rollout.sde(part.labels, self.policy), self.rollout.device
        if after is None:
            return StillSteps.through(sde, 0, stop, sde.start(part.noise.to(device)))
        x = sde.advance(after.step, after.drawn.to(device))
        return StillSteps.through(sde, after.step + 1, stop, x)

    def _tail(self, part: KeptRollouts, action: Action, share: float, *, end: bool) -> None:
        """The gradient of the advantage through the steps after the last draw."""
        steps = self._still(part, action, self.rollout.sde(part.labels).num_noisy + 1)
        if steps is None or part.pull is None:  # pragma: no cover (the caller has seen to it)
            raise RuntimeError("no gradient of the reward")
        with exact_products():
            pulled = pull_back(self.rollout, steps.end, part.pull.to(self.rollout.device))
        size = steps.end[0].numel() if self.settings.per_dimension else 1
        steps.pull(pulled * (-share / (len(part) * size)), self._pass, last=end)

    def _step(
        self, part: KeptRollouts, action: Action, share: float, watched: UpdateStats,
        before: StillSteps | None,
    ) -> Tensor:  # fmt: skip
        """The gradients of one noisy step's loss; that of the state it begins at, as returned."""
        settings, device = self.settings, self.rollout.device
        anchor = self.rollout.sde(part.labels, self.reference) if self.reference else None
        action = _moved(action, device)
        if before is not None and len(before.steps):
            # Where the weights of now lead, which several epochs have moved since the draw.
            action = action._replace(x=before.end.detach().requires_grad_(True))
        found = step_loss(
            self.rollout.sde(part.labels, self.policy),
            action,
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
        return torch.zeros_like(action.x) if action.x.grad is None else action.x.grad


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

    def begin(self, kept: KeptRollouts) -> None:
        """Make the samples again, at the weights that made them."""
        with torch.no_grad():
            self._samples = [
                self.rollout.latents(part.noise, part.labels).cpu()
                for part, _ in self.share.parts(kept, self.settings.micro_batch)
            ]

    def gradients(self, kept: KeptRollouts, epoch: int) -> dict[str, float]:
        """Add the gradients of the loss over all kept samples; its mean."""
        watched, draws = UpdateStats(), self.settings.noise_draws
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

    def _loss(self, samples: Tensor, part: KeptRollouts, names: tuple[str | int, ...]) -> Tensor:
        device, sampler = self.rollout.device, self.rollout.sampler
        noise, normal, uniform, drop = _draws(samples.shape[1:], part.rows, self.seed, names)
        network, labels, data = self.learner.network, part.labels, samples.to(device)
        noise = noise.to(device)
        if prediction_of(network) == VELOCITY:
            rate, null = float(getattr(network, "class_dropout_prob", 0.0)), _null(network)
            if null is not None:
                labels = labels.masked_fill(drop < rate, null)
            path = make_path(on_path(sampler, network).path)
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


@dataclass
class UpdateStats:
    """Means over images and steps of what an update did."""

    sums: dict[str, float] = field(default_factory=dict)
    count: float = 0.0

    @classmethod
    def together(cls, found: Iterable[Mapping[str, Any]]) -> UpdateStats:
        """Combine the statistics of several processes, field by field."""
        whole = cls()
        for part in found:
            whole.count += part["count"]
            for name, total in part["sums"].items():
                whole.sums[name] = whole.sums.get(name, 0.0) + total
        return whole

    def add(self, count: float, **values: float) -> None:
        """Values that are means over `count` images."""
        self.count += count
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + count * value

    def means(self) -> dict[str, float]:
        """By name."""
        return {name: total / max(self.count, 1) for name, total in self.sums.items()}
