"""From noise to features, with a denoiser whose samples are known in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from merge_rl.config.sampler import SamplerConfig
from merge_rl.core.merging.buffers import FlatCheckpoints, FlatLayout
from merge_rl.core.merging.live_model import LiveModel
from merge_rl.core.sampling.compatibility import balanced_labels
from merge_rl.errors import NonFiniteSamplesError
from merge_rl.interfaces import Autoencoder, Denoiser, FeatureExtractor
from merge_rl.rng import ImageStreams
from merge_rl.workflows.rollout.rollout import MergedRollout, Rollout

pytestmark = pytest.mark.numerics

SHAPE = (1, 2, 3)
SEEDS = [5, 0, 12, 7, 1, 9, 3]
LABELS = torch.tensor([0, 2, 1, 1, 0, 2, 2])


class PullToClass(nn.Module):
    """D(x; sigma, label) = gain * (label - 1) / 2: all data of a class lie in one point.

    The last Euler step, from the smallest noise level to 0, lands on D itself, so the samples are
    exactly gain * (label - 1) / 2. Row `broken` gives NaN.
    """

    def __init__(self, broken: int | None = None) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.broken, self.batches = broken, list[int]()

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        assert labels is not None
        self.batches.append(len(x))
        target = self.gain * (labels - 1.0) / 2
        out = target[:, None, None, None].expand(x.shape).clone()
        if self.broken is not None:
            out[labels == self.broken, :, 0, 1] = torch.nan
        return out


class KeepNoise:
    """D(x; sigma) = x / (1 + sigma^2): the denoiser of unit normal data, which keeps the noise."""

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        return x / (1 + sigma**2)


class Bytes:
    """Decodes [-1, 1] to 0..254 by rounding; NaN becomes 0, as in real decoders."""

    def decode(self, latents: Tensor) -> Tensor:
        return ((latents + 1) * 127).round().nan_to_num().clip(0, 255).to(torch.uint8)


class Pixels:
    """Features are the first four pixels."""

    name = "pixels"
    dim = 4

    def __call__(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        return images.flatten(1)[:, :4].float()


def build(model: Denoiser, batch: int = 3, log: list[int] | None = None) -> Rollout:
    return Rollout(
        model,
        SHAPE,
        sampler=SamplerConfig(num_steps=4),
        autoencoder=Bytes(),
        extractor=Pixels(),
        batch=batch,
        on_images=None if log is None else log.append,
    )


def test_fakes_fit_the_protocols() -> None:
    # mypy checks these assignments: the seams of interfaces.py are all a rollout needs.
    denoisers: list[Denoiser] = [PullToClass(), KeepNoise()]
    autoencoder: Autoencoder = Bytes()
    extractor: FeatureExtractor = Pixels()
    assert len(denoisers) == 2
    images = autoencoder.decode(torch.full((2, *SHAPE), 0.5))
    assert extractor(images).shape == (2, extractor.dim)


def test_samples_by_hand() -> None:
    # Labels 0, 1, 2 give samples -1/2, 0, 1/2: bytes 63.5 -> 64 (to even), 127, 190.5 -> 190.
    rollout = build(PullToClass())
    noise = rollout.noise(SEEDS)
    expected = torch.tensor([64, 127, 190])[LABELS]
    images = rollout.images(noise, LABELS)
    assert images.dtype == torch.uint8
    assert images.shape == (7, *SHAPE)
    assert torch.equal(images.long(), expected[:, None, None, None].expand(images.shape))
    features = rollout.features(noise, LABELS)
    assert features.dtype == torch.float32
    assert torch.equal(features, expected[:, None].expand(7, 4).float())


def test_noise_comes_from_the_seeds() -> None:
    noise = build(KeepNoise()).noise(SEEDS)
    assert torch.equal(noise, ImageStreams(SEEDS).randn(SHAPE))


@pytest.mark.parametrize("batch", [1, 2, 7, 100])
def test_the_batch_changes_nothing(batch: int) -> None:
    # Pointwise arithmetic: equal to the last bit. Shuffling the images shuffles the features.
    whole = build(KeepNoise(), batch=3)
    noise = whole.noise(SEEDS)
    expected = whole.features(noise, LABELS)
    assert len(torch.unique(expected, dim=0)) == 7
    found = build(KeepNoise(), batch=batch)
    assert torch.equal(found.features(noise, LABELS), expected)
    order = torch.tensor([6, 2, 0, 5, 1, 4, 3])
    assert torch.equal(found.features(noise[order], LABELS[order]), expected[order])


def test_failed_samples_are_flagged() -> None:
    rollout = build(PullToClass(broken=2))
    noise = rollout.noise(SEEDS)
    # The image alone does not tell: the broken pixel is a plausible black one, and not even among
    # the features of the extractor in general.
    images = Bytes().decode(rollout.latents(noise, LABELS))
    assert bool((images[LABELS == 2][:, :, 0, 1] == 0).all())
    # Of the first batch (classes 0, 2, 1) the second image is the broken one.
    with pytest.raises(NonFiniteSamplesError, match="after step 1 of 4: the norm of image 1 of th"):
        rollout.images(noise, LABELS)
    features = rollout.features(noise, LABELS)
    assert torch.equal(features.isnan(), (LABELS == 2)[:, None].expand(7, 4))


def test_images_are_counted_by_batch() -> None:
    log: list[int] = []
    model = PullToClass()
    rollout = build(model, batch=3, log=log)
    features = rollout.features(rollout.noise(SEEDS), LABELS)
    assert log == [3, 3, 1]
    # Heun with four steps: seven calls a batch.
    assert model.batches == [3] * 14 + [1] * 7
    assert not features.requires_grad


def test_guidance_reaches_the_sampler() -> None:
    # Guide gain 1/2, model gain 1, guidance 3: D = 1/2 + 3 (1 - 1/2) = 2 times (label - 1) / 2, so
    # the samples are -1, 0, 1 and the bytes 0, 127, 254.
    guide = PullToClass()
    guide.gain.data.fill_(0.5)
    rollout = Rollout(
        PullToClass(), SHAPE, sampler=SamplerConfig(num_steps=2, guidance=3.0, guide="x"),
        autoencoder=Bytes(), extractor=Pixels(), batch=4, guide=guide,
    )  # fmt: skip
    features = rollout.features(rollout.noise(SEEDS), LABELS)
    assert torch.equal(features[:, 0], torch.tensor([0.0, 127.0, 254.0])[LABELS])


def test_merged_rollout() -> None:
    # Checkpoints with gains 1 and -2. Coefficients (3, 1/2) give gain 2, the samples -1, 0, 1; then
    # (0, 1/2) give gain -1, the samples 1/2, 0, -1/2.
    layout = FlatLayout.of({"gain": ()})
    flat = FlatCheckpoints(layout, torch.tensor([[1.0], [-2.0]]), {})
    model = PullToClass()
    merged = MergedRollout(LiveModel(model, flat), build(model))
    noise = merged.rollout.noise(SEEDS)
    for row, values in (((3.0, 0.5), (0.0, 127.0, 254.0)), ((0.0, 0.5), (190.0, 127.0, 64.0))):
        coefficients = torch.tensor([row], dtype=torch.float64)
        found = merged.features(coefficients, noise, LABELS)
        assert torch.equal(found[:, 0], torch.tensor(values)[LABELS])


def test_balanced_labels() -> None:
    labels = balanced_labels(7, 3)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert labels.dtype == torch.int64
    assert balanced_labels(4, 0).tolist() == [0, 0, 0, 0]  # a network without classes
