"""The gradient of what a rollout ends in, with respect to the coefficients of its merge.

Samples are made once, each call of the network kept or made again when its turn comes to be
differentiated; features are those of every other rollout, to the bit. Backward passes add the
gradient of the flat weights up, and one pass over the checkpoints turns it into that of the
coefficients of every group.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_rl.config import FIXED_SOLVERS
from merge_rl.core.merging.live_model import coefficient_gradient
from merge_rl.core.network import against
from merge_rl.core.sampling.sampler import sample_with
from merge_rl.core.sampling.solvers import Velocity
from merge_rl.errors import ConfigError, OutOfMemoryError
from merge_rl.workflows.rollout.derivatives import (
    Room,
    StepWatch,
    made_again,
    problems_of,
    pull_back,
    require_derivative,
    room_for,
)
from merge_rl.workflows.rollout.execution import (
    calls_an_image,
    exact_products,
    matmul_precision,
    prepare_network,
)
from merge_rl.workflows.rollout.halving import is_out_of_memory
from merge_rl.workflows.rollout.rollout import MergedRollout, WorkItem
from merge_rl.workflows.rollout.tuned import TunedRollout

Cotangents = Callable[[Tensor], Tensor]
"""Features (N, D) of sound images -> the gradient of what is wanted by them, (N, D)."""


@dataclass(frozen=True, eq=False)
class Differentiated:
    """Features of the images of an item, and the gradient of the coefficients."""

    features: Tensor  # (N, D) float32 on the CPU; NaN in rows without a finite gradient
    gradient: Tensor  # (G, K) float64, of all rows where more is searched; NaN: no image has one
    dropped: tuple[str, ...]  # what was wrong with an image that was left out


class DifferentiableRollout:
    """A merged rollout by a fixed-step ODE whose decoder and extractor have derivatives.

    Made here, whatever the number of processes. `room` bounds what is kept for the way back: the
    images that are differentiated at a time follow from it, the gradient does not, beyond rounding.

    Raises ConfigError for a sampler, decoder or extractor without a derivative, by its name.
    """

    def __init__(
        self,
        merged: MergedRollout,
        *,
        room: Room | None = None,
        announce: Callable[[str], None] = lambda _text: None,
    ) -> None:
        if merged.live is None:
            raise ConfigError("expected a rollout whose network is a merge, got one without")
        self.merged, self.rollout, self.live = merged, merged.rollout, merged.live
        self.announce, self._room = announce, room
        self.tuned = merged if isinstance(merged, TunedRollout) else None
        self.lives = self.tuned.lives if self.tuned else [self.live]
        self._guidance: Tensor | None = None  # of the item, with a gradient
        self._prepare()

    def _prepare(self) -> None:
        """Refuse what has no derivative."""
        rollout = self.rollout
        if rollout.sampler.solver not in FIXED_SOLVERS:
            raise ConfigError(
                f"the gradient through a rollout needs a solver with fixed steps "
                f"({', '.join(FIXED_SOLVERS)}), got {rollout.sampler.solver}"
            )
        require_derivative(rollout)
        rest = rollout.sampler, rollout.device, self.announce
        self._network = prepare_network(rollout.model, *rest)
        self._guide = rollout.guide and prepare_network(rollout.guide, *rest)

    @property
    def calls(self) -> int:
        """Evaluations of the guided network an image takes."""
        return calls_an_image(self.rollout.sampler, self.rollout.model)

    @property
    def room(self) -> Room:
        """How many images are differentiated at a time; measured once, from two of them."""
        if self._room is None:
            self._room = room_for(self.rollout, self.live)
        return self._room

    def __call__(self, item: WorkItem, cotangents: Cotangents) -> Differentiated:
        """Features of the item's images, and d(sum of <features, cotangents>) / d coefficients.

        Images whose sample or gradient is not finite are left out, and their rows are NaN. Out of
        memory halves the images that are worked on at once; OutOfMemoryError if one is too many.
        """
        while True:
            try:
                with torch.enable_grad():
                    return self._differentiate(item, cotangents)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            self._halve(len(item.labels))

    def _halve(self, count: int) -> None:
        size = min(self.room.images, count)
        if size <= 1:
            raise OutOfMemoryError("out of memory with the gradient of one image at a time")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._room = Room(images=math.ceil(size / 2), kept=0)
        self.announce(f"out of memory with the gradients of {size} images: {self._room.images} now")

    def _differentiate(self, item: WorkItem, cotangents: Cotangents) -> Differentiated:
        self.merged.merge(item.coefficients)
        began = time.monotonic()
        noise, dropped = self.rollout.noise(item.seeds), list[str]()
        self.merged.seconds += time.monotonic() - began  # as without a gradient
        sound = torch.arange(len(item.labels))
        found = torch.full((len(sound), self.rollout.extractor.dim), torch.nan)
        sets = [live.checkpoints for live in self.lives]
        shapes = [(each.layout.num_groups, each.num_checkpoints) for each in sets]
        gradient = self._rows([torch.full(shape, torch.nan) for shape in shapes])
        while len(sound):
            features, totals, problems = self._both_ways(
                noise[sound], item.labels[sound], cotangents
            )
            if not problems:
                found[sound] = features
                gradient = self._rows(list(map(coefficient_gradient, sets, totals)))
                break
            dropped += [f"seed {item.seeds[int(sound[i])]}: {why}" for i, why in problems.items()]
            sound = sound[[i not in problems for i in range(len(sound))]]
        return Differentiated(found, gradient.double(), tuple(dropped))

    def _both_ways(
        self, noise: Tensor, labels: Tensor, cotangents: Cotangents
    ) -> tuple[Tensor, list[Tensor], dict[int, str]]:
        """Features, gradients of the flat weights, and what is wrong with which images."""
        began, rollout, size = time.monotonic(), self.rollout, self.room.images
        again = len(labels) * self.calls > self.room.kept
        samples, watches = list[Tensor](), list[StepWatch]()
        given = rollout.guidance
        self._guidance = None if given is None else given.clone().requires_grad_(True)
        with contextlib.ExitStack() as stack, matmul_precision(rollout.sampler):
            totals = [stack.enter_context(live.gradients()) for live in self.lives]
            for part, classes in zip(
                torch.split(noise, size), torch.split(labels, size), strict=True
            ):
                watches.append(StepWatch())
                samples.append(self._latents(part, classes, again, watches[-1]))
            with exact_products(), torch.no_grad():
                made = [rollout.extractor(rollout.decode(x)) for x in samples]
            features = torch.cat([rows.float().cpu() for rows in made])
            problems = problems_of(watches, features)
            if not problems:
                back = cotangents(features)
                for latents, rows in zip(samples, torch.split(back, size), strict=True):
                    with exact_products():
                        pulled = pull_back(rollout, latents, rows)
                    against(latents, pulled).backward()  # type: ignore[no-untyped-call]
                problems = problems_of(watches, features)
        self.merged.seconds += time.monotonic() - began
        return features, totals, problems

    def _rows(self, gradients: Sequence[Tensor]) -> Tensor:
        """Gradients of coefficients, with that of guidance, as rows where more is searched."""
        if self.tuned is None:
            return gradients[0]
        guidance = None if self._guidance is None else self._guidance.grad
        return self.tuned.gradient_rows(gradients, guidance)

    def _latents(self, noise: Tensor, labels: Tensor, again: bool, watch: StepWatch) -> Tensor:
        """Samples with what their way back needs; with `again` the network is called twice."""
        device = self.rollout.device
        return sample_with(
            self.rollout.sampler, self._network, noise.to(device), labels.to(device),
            guide=self._guide, through=made_again if again else _kept, on_step=watch,
            guidance=self._guidance,
        )  # fmt: skip


def _kept(evaluate: Velocity) -> Velocity:
    return evaluate
