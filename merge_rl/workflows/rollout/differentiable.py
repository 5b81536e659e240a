"""The gradient of what a rollout ends in, with respect to the coefficients of its merge.

Samples are made once, each call of the network kept or made again when its turn comes to be
differentiated; features are those of every other rollout, to the bit. Backward passes add the
gradient of the flat weights up, and one pass over the checkpoints turns it into that of the
coefficients of every group.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from merge_rl.config import FIXED_SOLVERS
from merge_rl.core.merging.live_model import coefficient_gradient
from merge_rl.core.network import against
from merge_rl.core.sampling.sampler import sample_with
from merge_rl.core.sampling.solvers import Velocity
from merge_rl.errors import ConfigError, OutOfMemoryError
from merge_rl.workflows.rollout.compiled import prepare_network
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
    is_out_of_memory,
    matmul_precision,
)
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


@dataclass(frozen=True, eq=False)
class BothWays:
    """Features and gradient of images (forward and backward pass), or what was not finite."""

    features: Tensor  # (N, D) float32 on the CPU
    gradient: Tensor  # as of `Differentiated`
    problems: dict[int, str]  # what is wrong with which image


@runtime_checkable
class GradientSpread(Protocol):
    """Differentiates images with the help of other processes."""

    def both_ways(
        self, rollout: DifferentiableRollout, item: WorkItem, cotangents: Cotangents, /
    ) -> BothWays:
        """What `rollout.both_ways` gives, to rounding, for a given number of processes."""
        ...


class DifferentiableRollout:
    """A merged rollout by a fixed-step ODE whose decoder and extractor have derivatives.

    `room` bounds what is kept for the way back: the images that are differentiated at a time follow
    from it, the gradient does not, beyond rounding. Where other processes help, each takes
    neighbouring parts of that size, and their gradients are summed in the order of ranks.

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
        spread, dropped = self.merged.spread, list[str]()
        shared = spread if isinstance(spread, GradientSpread) else None
        sound = torch.arange(len(item.labels))
        found = torch.full((len(sound), self.rollout.extractor.dim), torch.nan)
        gradient = torch.full_like(self.no_gradient(), torch.nan)
        while len(sound):
            seeds = [item.seeds[i] for i in sound.tolist()]
            part = dataclasses.replace(item, seeds=seeds, labels=item.labels[sound])
            made = (
                self.both_ways(part, cotangents)
                if shared is None
                else shared.both_ways(self, part, cotangents)
            )
            if not made.problems:
                found[sound], gradient = made.features, made.gradient
                break
            dropped += [f"seed {seeds[i]}: {why}" for i, why in made.problems.items()]
            sound = sound[[i not in made.problems for i in range(len(sound))]]
        return Differentiated(found, gradient, tuple(dropped))

    def both_ways(self, item: WorkItem, cotangents: Cotangents) -> BothWays:
        """Features and gradient of the item's images, made here."""
        with Way(self, item, self.room) as way:
            if not way.problems():
                way.back(cotangents(way.features))
        return BothWays(way.features, way.gradient(), way.problems())

    def no_gradient(self) -> Tensor:
        """Zeros, as many as the gradient of coefficients has, (G, K) or rows with more."""
        sets = [live.checkpoints for live in self.lives]
        shapes = [(each.layout.num_groups, each.num_checkpoints) for each in sets]
        return self.rows([torch.zeros(shape, dtype=torch.float64) for shape in shapes], None)

    def rows(self, gradients: Sequence[Tensor], guidance: Tensor | None) -> Tensor:
        """Gradients of coefficients, with that of guidance, as rows where more is searched."""
        if self.tuned is None:
            return gradients[0]
        return self.tuned.gradient_rows(gradients, guidance).double()

    def latents(
        self, noise: Tensor, labels: Tensor, again: bool, watch: StepWatch, guidance: Tensor | None
    ) -> Tensor:
        """Samples, kept for the backward pass; with `again` the network is called twice instead."""
        device = self.rollout.device
        return sample_with(
            self.rollout.sampler, self._network, noise.to(device), labels.to(device),
            guide=self._guide, through=made_again if again else _kept, on_step=watch,
            guidance=guidance,
        )  # fmt: skip


class Way:
    """Forward pass of an item's images, kept for the backward pass; a context with gradients."""

    def __init__(self, maker: DifferentiableRollout, item: WorkItem, room: Room) -> None:
        self._maker, self._item, self._room = maker, item, room
        self._stack, self._watches = contextlib.ExitStack(), list[StepWatch]()
        self._samples, self._totals = list[Tensor](), list[Tensor]()
        self._guidance: Tensor | None = None  # of the item, with a gradient
        self.features = torch.empty(0, maker.rollout.extractor.dim)  # (N, D) float32 on the CPU

    def __enter__(self) -> Way:
        merged, self._began = self._maker.merged, time.monotonic()
        merged.merge(self._item.coefficients)
        given = merged.rollout.guidance
        self._guidance = None if given is None else given.clone().requires_grad_(True)
        try:
            self._stack.enter_context(torch.enable_grad())
            self._stack.enter_context(matmul_precision(merged.rollout.sampler))
            lives = self._maker.lives
            self._totals = [self._stack.enter_context(live.gradients()) for live in lives]
            self._make()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._stack.__exit__(kind, error, trace)
        self._maker.merged.seconds += time.monotonic() - self._began

    def _make(self) -> None:
        rollout, labels, size = self._maker.rollout, self._item.labels, self._room.images
        again = len(labels) * self._maker.calls > self._room.kept
        noise = rollout.noise(self._item.seeds) if len(labels) else torch.empty(0)
        for part, classes in zip(torch.split(noise, size), torch.split(labels, size), strict=True):
            if len(part):  # a rank may have none
                watch = StepWatch()
                self._watches.append(watch)
                made = self._maker.latents(part, classes, again, watch, self._guidance)
                self._samples.append(made)
        with exact_products(), torch.no_grad():
            # Detached: an extractor may return its input, which has the whole way behind it.
            samples = [x.detach() for x in self._samples]
            parts = [rollout.extractor(rollout.decode(x)).float().cpu() for x in samples]
        self.features = torch.cat([self.features, *parts])

    def problems(self) -> dict[int, str]:
        """Image -> what of it was not finite so far."""
        return problems_of(self._watches, self.features)

    def back(self, cotangents: Tensor) -> None:
        """Add the gradients of <features, cotangents> up, rows (N, D) of both."""
        rows = torch.split(cotangents, self._room.images) if self._samples else ()
        for latents, part in zip(self._samples, rows, strict=True):
            with exact_products():
                pulled = pull_back(self._maker.rollout, latents, part)
            against(latents, pulled).backward()  # type: ignore[no-untyped-call]

    def gradient(self) -> Tensor:
        """Gradient of the coefficients, as in `Differentiated`; after the context is left."""
        sets = [live.checkpoints for live in self._maker.lives]
        guidance = None if self._guidance is None else self._guidance.grad
        return self._maker.rows(list(map(coefficient_gradient, sets, self._totals)), guidance)


def _kept(evaluate: Velocity) -> Velocity:
    return evaluate
