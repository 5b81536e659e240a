"""Rollouts that an update learns from, and what one of several processes has of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from merge_rl.core.sampling.sampler import following, make_sde, sample_with, without_noise
from merge_rl.core.sampling.sde import SDE, solve_sde
from merge_rl.core.sampling.solvers import NormWatch
from merge_rl.core.step_policy import Action, WindowedSDE, replay
from merge_rl.interfaces import Denoiser
from merge_rl.workflows.rollout import Rollout, made_again

Window = tuple[int, int]
"""(first, stop): the steps first..stop-1 are noisy, the others take those of the ODE."""


class PolicyRollout(Rollout):
    """A rollout under an SDE with noise in a window of steps, or in all (None); or under an ODE.

    What an image is follows from the weights, its starting noise and its label, so that a rollout
    can be gone through again without having been kept.
    """

    window: Window | None = None
    graphs_below = 0  # its weights may be shards that are gathered for a call

    def sde(self, labels: Tensor, network: Denoiser | None = None) -> SDE:
        """The SDE of images with these labels; of another network of the same kind, if given."""
        noisy = make_sde(
            self.sampler, network or self._network, labels.to(self.device), guide=self._guide
        )
        if self.window is None:
            return noisy
        return WindowedSDE(noisy, without_noise(noisy), *self.window)

    def latents(self, noise: Tensor, labels: Tensor, *, check_finite: bool = False) -> Tensor:
        """Samples of one batch, (B, C, h, w) float32 on the device."""
        if not self.sampler.is_sde:
            return super().latents(noise, labels, check_finite=check_finite)
        start = noise.to(self.device)
        watch = NormWatch(self.sde(labels).start(start)) if check_finite else None
        samples = solve_sde(self.sde(labels), start, following(noise), on_step=watch)
        if watch is not None:
            watch.check()
        return samples

    def followed(self, noise: Tensor, labels: Tensor, network: Denoiser) -> Tensor:
        """Samples with gradients, in the memory of one call of `network`.

        Those of an SDE draw what `latents` draws.
        """
        return sample_with(
            self.sampler, network, noise.to(self.device), labels.to(self.device),
            guide=self._guide, through=made_again,
        )  # fmt: skip

    def replay(self, noise: Tensor, labels: Tensor) -> list[Action]:
        """The actions of one batch at the present weights, on the device."""
        return replay(self.sde(labels), noise.to(self.device), following(noise))


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


@dataclass(frozen=True, eq=False)
class KeptRollouts:
    """Rollouts that an update learns from."""

    noise: Tensor  # (M, C, h, w)
    labels: Tensor  # (M,)
    advantages: Tensor  # (M,)
    rows: Tensor  # (M,) int64, their places among all rollouts of the step
    step: int
    pull: Tensor | None = None  # (M, D), derivative of an advantage by the image's features

    def __len__(self) -> int:
        return len(self.labels)

    def rows_of(self, start: int, stop: int) -> KeptRollouts:
        """Those at start..stop-1."""
        part = slice(start, stop)
        pull = None if self.pull is None else self.pull[part]
        return KeptRollouts(
            self.noise[part], self.labels[part], self.advantages[part], self.rows[part], self.step,
            pull,
        )  # fmt: skip

    def parts(self, size: int) -> Iterator[KeptRollouts]:
        """Micro-batches."""
        for start in range(0, len(self), size):
            yield self.rows_of(start, start + size)


def write_kept(kept: KeptRollouts) -> dict[str, Any]:
    """All but noise and pull as plain data."""
    return {
        "labels": kept.labels.tolist(), "advantages": kept.advantages.double().tolist(),
        "rows": kept.rows.tolist(), "step": kept.step,
    }  # fmt: skip


def read_kept(
    document: Mapping[str, Any], noise: Tensor, pull: Tensor | None = None
) -> KeptRollouts:
    """What `write_kept` wrote; numbers are the same to the last bit."""
    return KeptRollouts(
        noise,
        torch.tensor(document["labels"], dtype=torch.int64),
        torch.tensor(document["advantages"], dtype=torch.float64),
        torch.tensor(document["rows"], dtype=torch.int64),
        document["step"],
        pull,
    )
