"""How kept rollouts become gradients: policy gradient, or the family's own training loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from merge_rl.config import UpdateConfig
from merge_rl.core.sampling.compatibility import VELOCITY, prediction_of
from merge_rl.core.sampling.paths import make_path
from merge_rl.core.step_policy import (
    Action,
    denoising_loss,
    log_normal_levels,
    step_loss,
    uniform_times,
    velocity_loss,
)
from merge_rl.interfaces import Denoiser
from merge_rl.rng import stream
from merge_rl.workflows.finetune.learner import Learner
from merge_rl.workflows.finetune.rollout import PolicyRollout
from merge_rl.workflows.rollout import prepare_network


def _alone(watched: UpdateStats) -> dict[str, float]:
    return watched.means()


@dataclass(frozen=True)
class ProcessShare:
    """What one of `size` processes has of an update's rollouts: about as many as any other.

    Every process passes through equally many micro-batches, as exchanges of gradients need: one
    that has fewer passes through a rollout that weighs nothing.
    """

    rank: int = 0
    size: int = 1

    def parts(self, kept: KeptRollouts, limit: int) -> list[tuple[KeptRollouts, int]]:
        """Micro-batches of at most `limit` rollouts, with how many each counts for.

        For `size` times its own, or for none: the mean over processes of sums is then the sum.
        """
        total = len(kept)
        bounds = [total * rank // self.size for rank in range(self.size + 1)]
        own = kept.rows_of(bounds[self.rank], bounds[self.rank + 1])
        parts = [(part, self.size * len(part)) for part in own.parts(limit)]
        slots = max(-(-(stop - start) // limit) for start, stop in pairwise(bounds))
        return parts + [(kept.rows_of(0, 1), 0)] * (slots - len(parts))


class Update:
    """What both kinds of updates have of the other processes: by default there are none."""

    share = ProcessShare()
    means: Callable[[UpdateStats], dict[str, float]] = staticmethod(_alone)  # over all processes
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
            for j, action in enumerate(actions):
                self.between()
                last = i + 1 == len(parts) and j + 1 == len(actions)
                with self.learner.passing(last=last):
                    share = count / (len(kept) * len(actions))
                    self._step(part, action, share, watched)
        return self.means(watched)

    def _step(self, part: KeptRollouts, action: Action, share: float, watched: UpdateStats) -> None:
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


@dataclass(frozen=True, eq=False)
class KeptRollouts:
    """Rollouts that an update learns from."""

    noise: Tensor  # (M, C, h, w)
    labels: Tensor  # (M,)
    advantages: Tensor  # (M,)
    rows: Tensor  # (M,) int64, their places among all rollouts of the step
    step: int

    def __len__(self) -> int:
        return len(self.labels)

    def rows_of(self, start: int, stop: int) -> KeptRollouts:
        """Those at start..stop-1."""
        part = slice(start, stop)
        return KeptRollouts(
            self.noise[part], self.labels[part], self.advantages[part], self.rows[part], self.step
        )

    def parts(self, size: int) -> Iterator[KeptRollouts]:
        """Micro-batches."""
        for start in range(0, len(self), size):
            yield self.rows_of(start, start + size)


def write_kept(kept: KeptRollouts) -> dict[str, Any]:
    """All but the noise as plain data."""
    return {
        "labels": kept.labels.tolist(), "advantages": kept.advantages.double().tolist(),
        "rows": kept.rows.tolist(), "step": kept.step,
    }  # fmt: skip


def read_kept(document: Mapping[str, Any], noise: Tensor) -> KeptRollouts:
    """What `write_kept` wrote; numbers are the same to the last bit."""
    return KeptRollouts(
        noise,
        torch.tensor(document["labels"], dtype=torch.int64),
        torch.tensor(document["advantages"], dtype=torch.float64),
        torch.tensor(document["rows"], dtype=torch.int64),
        document["step"],
    )


@dataclass
class UpdateStats:
    """Means over images and steps of what an update did."""

    sums: dict[str, float] = field(default_factory=dict)
    count: float = 0.0

    @classmethod
    def together(cls, found: Iterable[Mapping[str, Any]]) -> UpdateStats:
        """What several processes have seen, of their fields."""
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
