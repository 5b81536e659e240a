"""From noise to features: sample, decode, extract."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from merge_rl.config import SamplerConfig
from merge_rl.core.compatibility import require_sampler
from merge_rl.core.live_model import LiveModel
from merge_rl.core.sampling import sample_with
from merge_rl.interfaces import Autoencoder, Denoiser, FeatureExtractor
from merge_rl.rng import ImageStreams
from merge_rl.workflows.fast import matmul_precision, prepare_network


class Rollout:
    """Generates with one network, whatever weights it holds at the moment.

    Deterministic: an image is a function of the weights, its noise and its label, with an SDE too.
    `batch` bounds memory and `workers` batches are made side by side; results depend on neither
    beyond rounding (adaptive solvers excepted, which choose their steps by the whole batch).

    Raises ConfigError for a sampler that does not fit the network.
    """

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
    ) -> None:
        self.model, self.shape = model, tuple(shape)
        self.autoencoder, self.extractor = autoencoder, extractor
        self.batch, self.device, self.guide = batch, torch.device(device), guide
        self.workers = workers
        self.on_images = on_images or (lambda _count: None)
        self._take_sampler(sampler)

    def _take_sampler(self, sampler: SamplerConfig) -> None:
        require_sampler(sampler, self.model, self.guide)
        self.sampler = sampler
        self._network = prepare_network(self.model, sampler, self.device)
        self._guide = self.guide and prepare_network(self.guide, sampler, self.device)

    def with_sampler(self, sampler: SamplerConfig) -> Rollout:
        """The same network, decoder and extractor with another sampler (and the same guide)."""
        other = copy.copy(self)
        other._take_sampler(sampler)
        return other

    def with_network(self, model: Denoiser) -> Rollout:
        """The same settings with another network of the same kind."""
        other = copy.copy(self)
        other.model = model
        other._take_sampler(self.sampler)
        return other

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
        return sample_with(
            self.sampler,
            self._network,
            noise.to(self.device),
            labels.to(self.device),
            guide=self._guide,
            check_finite=check_finite,
        )

    def images(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Images (N, C, H, W) uint8 on the CPU; NonFiniteSamplesError where one is not finite."""
        return self._in_batches(self.autoencoder.decode, noise, labels, check_finite=True)

    def features(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Features (N, D) float32 on the CPU; a row is NaN where the sample is not finite.

        The check is made before decoding, where clipping to uint8 would turn NaN into a plausible
        black image.
        """

        def extract(latents: Tensor) -> Tensor:
            rows = self.extractor(self.autoencoder.decode(latents)).float()
            failed = ~latents.flatten(1).isfinite().all(1)
            return rows.masked_fill(failed[:, None], float("nan"))

        return self._in_batches(extract, noise, labels)

    def _in_batches(
        self,
        finish: Callable[[Tensor], Tensor],
        noise: Tensor,
        labels: Tensor,
        *,
        check_finite: bool = False,
    ) -> Tensor:
        """finish(latents) of every batch, in order, on the CPU."""
        size = batch_size(len(noise), self.batch)
        starts = range(0, len(noise), size)

        def work(start: int) -> Tensor:
            rows = slice(start, start + size)
            with torch.no_grad():  # a thread starts with gradients on
                latents = self.latents(noise[rows], labels[rows], check_finite=check_finite)
                return finish(latents).cpu()

        parts = []
        with matmul_precision(self.sampler), self._spread(len(starts)) as run:
            for part in run(work, starts):
                parts.append(part)
                self.on_images(len(part))
        return torch.cat(parts)

    @contextlib.contextmanager
    def _spread(self, batches: int) -> Iterator[Callable[..., Iterable[Tensor]]]:
        """A map over batches: in threads where there is a batch for each, else one by one.

        Small networks on the CPU lose much of a second core to synchronisation inside operations;
        whole batches side by side, each on one core, do not.
        """
        if self.workers < 2 or batches < self.workers:
            yield map
            return
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        pool = ThreadPoolExecutor(self.workers)
        try:
            yield pool.map
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)


def batch_size(count: int, limit: int) -> int:
    """Images in one batch: at most `limit`, and at least two batches where that leaves 25 each.

    The second batch keeps a second core busy. The rule does not ask how many cores there are, so
    that the last bits of a result do not depend on them.
    """
    return min(limit, math.ceil(count / 2)) if count >= 50 else min(limit, max(count, 1))


class MergedRollout:
    """A rollout whose network is the merge with given coefficients."""

    def __init__(self, live: LiveModel, rollout: Rollout) -> None:
        self.live, self.rollout = live, rollout

    def features(self, coefficients: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
        """Features (N, D) of images that the merge (G, K) makes of noise and labels."""
        self.live.set_coefficients(coefficients)
        return self.rollout.features(noise, labels)


def balanced_labels(count: int, num_classes: int) -> Tensor:
    """Labels 0, 1, ..., K-1, 0, 1, ...: (count,) int64; every run of K rows has each class once."""
    return torch.arange(count) % max(num_classes, 1)
