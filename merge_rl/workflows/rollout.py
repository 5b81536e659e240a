"""From noise to features: sample, decode, extract."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from merge_rl.config import SamplerConfig
from merge_rl.core.merging import LiveModel
from merge_rl.core.sampling import sample
from merge_rl.interfaces import Autoencoder, Denoiser, FeatureExtractor
from merge_rl.rng import ImageStreams


class Rollout:
    """Generates with one network, whatever weights it holds at the moment.

    Deterministic: an image is a function of the weights, its noise and its label. `batch` bounds
    memory; results do not depend on it beyond rounding.
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
        on_images: Callable[[int], None] | None = None,
    ) -> None:
        self.model, self.shape, self.sampler = model, tuple(shape), sampler
        self.autoencoder, self.extractor = autoencoder, extractor
        self.batch, self.device, self.guide = batch, torch.device(device), guide
        self.on_images = on_images or (lambda _count: None)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Noise (N, C, h, w) on the CPU, row i from seeds[i] alone."""
        return ImageStreams(seeds).randn(self.shape)

    def latents(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Samples of one batch, (B, C, h, w) float32 on the device."""
        settings = self.sampler
        return sample(
            self.model,
            noise.to(self.device),
            labels.to(self.device),
            solver=settings.solver,
            num_steps=settings.num_steps,
            guidance=settings.guidance,
            guide=self.guide,
            sigma_min=settings.sigma_min,
            sigma_max=settings.sigma_max,
            rho=settings.rho,
        )

    def _batches(self, noise: Tensor, labels: Tensor) -> Iterator[Tensor]:
        for start in range(0, len(noise), self.batch):
            stop = start + self.batch
            yield self.latents(noise[start:stop], labels[start:stop])

    def images(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Images (N, C, H, W) uint8 on the CPU."""
        with torch.no_grad():
            parts = [self.autoencoder.decode(x).cpu() for x in self._batches(noise, labels)]
        return torch.cat(parts)

    def features(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Features (N, D) float32 on the CPU; a row is NaN where the sample is not finite.

        The check is made before decoding, where clipping to uint8 would turn NaN into a plausible
        black image.
        """
        parts = []
        with torch.no_grad():
            for latents in self._batches(noise, labels):
                rows = self.extractor(self.autoencoder.decode(latents)).float()
                failed = ~latents.flatten(1).isfinite().all(1)
                parts.append(rows.masked_fill(failed[:, None], float("nan")).cpu())
                self.on_images(len(latents))
        return torch.cat(parts)


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
