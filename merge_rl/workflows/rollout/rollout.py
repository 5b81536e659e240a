"""From noise to features: sample, decode, extract."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from merge_rl.config import SamplerConfig
from merge_rl.core.merging.live_model import LiveModel
from merge_rl.core.sampling.compatibility import on_path, require_sampler
from merge_rl.core.sampling.sampler import sample_with
from merge_rl.interfaces import Autoencoder, Denoiser, FeatureExtractor
from merge_rl.parallel.blocks import Block, split_blocks
from merge_rl.rng import ImageStreams
from merge_rl.workflows.rollout.compiled import prepare_decoder
from merge_rl.workflows.rollout.execution import (
    BatchHalving,
    Transform,
    exact_products,
    matmul_precision,
    overlapped,
    streams_of,
    threads,
)
from merge_rl.workflows.rollout.graphs import PAYS_BELOW, as_graphs, renew

Inputs = tuple[Tensor, Tensor]  # noise (B, C, h, w) and labels (B,) of one block
Ask = Callable[[], Inputs]  # called when the block is made


class Rollout:
    """Generates with one network, whatever weights it holds at the moment.

    Deterministic: an image is a function of the weights, its noise and its label, with an SDE too.
    `batch` bounds memory and `workers` batches are made side by side; results depend on neither
    beyond rounding (adaptive solvers excepted, which choose their steps by the whole batch).
    Raises ConfigError for a sampler that does not fit the network.
    """

    graphs_below = PAYS_BELOW  # weights of a network that runs as CUDA graphs
    guidance: Tensor | None = None  # (3,) as of `sample_with`, in the place of the sampler's

    def __init__(
        self,
        model: Denoiser,
        shape: Sequence[int],
        *,
        sampler: SamplerConfig,
        autoencoder: Autoencoder,
        extractor: FeatureExtractor,
        batch: int,
        device: str = "cpu",
        guide: Denoiser | None = None,
        workers: int = 1,
        on_images: Callable[[int], None] | None = None,
        announce: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self.model, self.shape = model, tuple(shape)
        self.autoencoder, self.extractor = autoencoder, extractor
        self.device, self.guide = torch.device(device), guide
        self.batch, self.workers = batch, workers
        self.on_images = on_images or (lambda _count: None)
        self._sampling, self._finishing = BatchHalving(announce), BatchHalving(announce)
        self._take_sampler(sampler)

    def _take_sampler(self, sampler: SamplerConfig) -> None:
        require_sampler(sampler, self.model, self.guide)
        self.sampler = sampler = on_path(sampler, self.model)
        rest = sampler, self.device, self._sampling.announce
        self._network = as_graphs(self.model, *rest, self.graphs_below)
        self._guide = self.guide and as_graphs(self.guide, *rest, self.graphs_below)
        self.decode = prepare_decoder(self.autoencoder, *rest)

    def with_sampler(self, sampler: SamplerConfig) -> Rollout:
        """The same network, decoder and extractor with another sampler (and the same guide)."""
        other = copy.copy(self)
        other._take_sampler(sampler)
        return other

    def with_network(self, model: Denoiser) -> Rollout:
        """The same settings with another network of the same kind."""
        other = copy.copy(self)
        other.model = model
        return other.with_sampler(self.sampler)

    def with_extractor(self, extractor: FeatureExtractor) -> Rollout:
        """The same network and settings with another extractor."""
        other = copy.copy(self)
        other.extractor = extractor
        return other

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Noise (N, C, h, w) on the CPU, row i from seeds[i] alone."""
        return ImageStreams(seeds).randn(self.shape)

    def latents(self, noise: Tensor, labels: Tensor, *, check_finite: bool = False) -> Tensor:
        """Samples of one batch, (B, C, h, w) float32 on the device.

        With `check_finite` NonFiniteSamplesError names the step at which samples cease to be so.
        """
        if self.device.type == "cuda":
            renew(self._network, self._guide)
        return sample_with(
            self.sampler, self._network, noise.to(self.device), labels.to(self.device),
            guide=self._guide, check_finite=check_finite, guidance=self.guidance,
        )  # fmt: skip

    def images(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Images (N, C, H, W) uint8 on the CPU; NonFiniteSamplesError where one is not finite."""
        return self._in_blocks(self.decode, noise, labels, check_finite=True)

    def features(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Features (N, D) float32 on the CPU; of rows that are not finite see `Failures`."""
        return self._in_blocks(self._extract, noise, labels)

    def features_of(self, blocks: Sequence[Ask]) -> Iterator[Tensor]:
        """Features (B, D) of each block's noise and labels, in order.

        On an accelerator blocks may be asked for before those in front of them are finished; what
        a block needs of the network must be set up when it is asked for, not earlier.
        """
        return self._run(self._extract, blocks)

    def _extract(self, latents: Tensor) -> Tensor:
        # Latents are looked at as well: clipped to uint8, NaN is a plausible black image.
        rows = self.extractor(self.decode(latents)).float()
        rows = rows.masked_fill(~rows.isfinite().all(1, keepdim=True), float("inf"))
        failed = ~latents.flatten(1).isfinite().all(1)
        return rows.masked_fill(failed[:, None], float("nan"))

    def _in_blocks(
        self, finish: Transform, noise: Tensor, labels: Tensor, *, check_finite: bool = False
    ) -> Tensor:
        """finish(latents) of every block, in order, on the CPU."""

        def inputs(block: Block) -> Inputs:
            return noise[block.start : block.stop], labels[block.start : block.stop]

        blocks = split_blocks([max(len(noise), 1)], self.batch)
        parts = self._run(finish, [partial(inputs, b) for b in blocks], check_finite=check_finite)
        return torch.cat(list(parts))

    def _run(
        self, finish: Transform, blocks: Sequence[Ask], *, check_finite: bool = False
    ) -> Iterator[Tensor]:
        def make(block: Ask) -> Tensor:
            with torch.no_grad():  # a thread starts with gradients on
                latents = partial(self.latents, check_finite=check_finite)
                return self._sampling(latents, *block())

        def finished(latents: Tensor) -> Tensor:
            with torch.no_grad():
                return self._finishing(finish, latents)

        def apart(block: Ask) -> Tensor:
            with matmul_precision(self.sampler):
                return make(block)

        def exact(latents: Tensor) -> Tensor:
            with exact_products():
                return finished(latents)

        if self.device.type == "cuda":
            makers = [partial(apart, block) for block in blocks]
            for part in overlapped(makers, exact, streams_of(self.device)):
                self.on_images(len(part))
                yield part
            return
        # The setting is the process's: threads share it.
        with matmul_precision(self.sampler), threads(self.workers, len(blocks)) as run:
            for part in run(lambda block: finished(make(block)).cpu(), blocks):
                self.on_images(len(part))
                yield part


@dataclass(frozen=True, eq=False)
class WorkItem:
    """Images to make: of which coefficients, from which seeds, of which classes."""

    coefficients: Tensor | None  # (G, K); None: the network as it is
    seeds: Sequence[int]  # one an image
    labels: Tensor  # (N,) int64


class Spread(Protocol):
    """Makes work items with the help of other processes."""

    def __call__(
        self, rollout: MergedRollout, items: Sequence[WorkItem], phase: str, /
    ) -> list[Tensor]:
        """Features (N, D) of each item's images, as `rollout` alone would make them."""
        ...


class MergedRollout:
    """A rollout whose network is the merge with given coefficients.

    Args:
        live: sets the network's weights; None for a network that stays as it is.
        rollout: samples it.
        name: what other processes know this rollout by.
        spread: shares work items among processes; None: all are made here.

    `seconds` counts the time that work items took, without that of merging.
    """

    def __init__(
        self,
        live: LiveModel | None,
        rollout: Rollout,
        *,
        name: str = "",
        spread: Spread | None = None,
    ) -> None:
        self.live, self.rollout, self.name, self.spread = live, rollout, name, spread
        self.processes = 1  # among which `spread` shares
        self.seconds = 0.0

    def with_sampler(self, sampler: SamplerConfig) -> MergedRollout:
        """The same networks under another sampler."""
        other = copy.copy(self)
        other.rollout = self.rollout.with_sampler(sampler)
        return other

    def features(self, coefficients: Tensor | None, noise: Tensor, labels: Tensor) -> Tensor:
        """Features (N, D) of images that the merge (G, K) makes of noise and labels, made here."""
        self.merge(coefficients)
        return self.rollout.features(noise, labels)

    def features_of(self, items: Sequence[WorkItem], phase: str = "") -> list[Tensor]:
        """Features (N, D) of each item's images; `phase` is for messages.

        The same to the last bit whoever makes which part.
        """
        began = time.monotonic()
        made = self._made(items, phase)
        self.seconds += time.monotonic() - began
        return made

    def _made(self, items: Sequence[WorkItem], phase: str) -> list[Tensor]:
        if self.spread is not None:
            return self.spread(self, items, phase)
        if self.rollout.device.type == "cuda":  # one line of blocks keeps both streams busy
            counts = [len(item.labels) for item in items]
            rows = self.rows(items, split_blocks(counts, self.rollout.batch))
            return list(torch.split(rows, counts))
        repeated = Counter(id(item.seeds) for item in items)
        known: dict[int, Tensor] = {}
        made = []
        for item in items:
            key = id(item.seeds)
            noise = known[key] if key in known else self.rollout.noise(item.seeds)
            if repeated[key] > 1:  # candidates see the same noise
                known[key] = noise
            made.append(self.features(item.coefficients, noise, item.labels))
        return made

    def rows(self, items: Sequence[WorkItem], blocks: Sequence[Block]) -> Tensor:
        """Features (N, D) of the images of some blocks of the items, in order, made here."""
        return torch.cat([torch.empty(0, self.rollout.extractor.dim), *self.parts(items, blocks)])

    def parts(self, items: Sequence[WorkItem], blocks: Sequence[Block]) -> Iterator[Tensor]:
        """Features (B, D) of one block after the other, made here."""
        begun: int | None = None

        def begin(index: int) -> None:
            nonlocal begun
            if begun != index:
                self.merge(items[index].coefficients)
                begun = index

        def inputs(block: Block) -> Inputs:
            begin(block.item)
            item, part = items[block.item], slice(block.start, block.stop)
            return self.rollout.noise(item.seeds[part]), item.labels[part]

        for group in self._groups(blocks):
            begin(group[0].item)  # threads find the weights in place
            yield from self.rollout.features_of([partial(inputs, block) for block in group])

    def _groups(self, blocks: Sequence[Block]) -> list[list[Block]]:
        """Blocks that may be under way at the same time."""
        if self.rollout.device.type == "cuda":  # in order: a merge waits for its turn
            return [list(blocks)] if blocks else []
        return [list(group) for _, group in groupby(blocks, key=lambda block: block.item)]

    def merge(self, coefficients: Tensor | None) -> None:
        if self.live is not None and coefficients is not None:
            began = time.monotonic()
            self.live.set_coefficients(coefficients)
            self.seconds -= time.monotonic() - began
