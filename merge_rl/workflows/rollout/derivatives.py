"""What gradients through a rollout need: derivatives of decoder and extractor, and room in memory.

Images whose way there or back is not finite are found and named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from merge_rl.core.merging.live_model import LiveModel
from merge_rl.core.network import against
from merge_rl.core.sampling.sampler import sample_with
from merge_rl.core.sampling.solvers import Velocity
from merge_rl.errors import ConfigError
from merge_rl.interfaces import Autoencoder, FeatureExtractor
from merge_rl.workflows.rollout.rollout import Rollout

ALIKE = 1e-3  # of a feature vector's norm: how near those of bytes and of whole numbers must be


def require_derivative(rollout: Rollout, instead: str = "the searcher auto") -> None:
    """Raise ConfigError, naming the part, unless features of samples have a derivative.

    The sentence ends with what does without (`instead`).
    """
    samples = rollout.noise([0, 1]).to(rollout.device) / 4
    why = without_derivative(rollout.autoencoder, rollout.extractor, samples)
    if why is not None:
        raise ConfigError(f"{why}; {instead} does without")


def without_derivative(
    autoencoder: Autoencoder, extractor: FeatureExtractor, samples: Tensor
) -> str | None:
    """Why features of samples (B, C, h, w) have no derivative; None where they have one.

    The decoder must offer `levels`, and every extractor must take them with a gradient and give
    what it gives for bytes.
    """
    levels = getattr(autoencoder, "levels", None)
    decoder = f"the decoder {getattr(autoencoder, 'name', type(autoencoder).__name__)}"
    if levels is None:
        return f"{decoder} has no derivative: it has no method `levels`"
    with torch.no_grad():
        images = autoencoder.decode(samples)
    with torch.enable_grad():
        found = levels(samples.clone().requires_grad_(True))
    if images.shape != found.shape or float((images.float() - found.detach()).abs().max()) > 1:
        return f"{decoder} has no derivative: its `levels` are not its images"
    if images.dtype == torch.uint8 and not torch.equal(found, found.round()):
        return (
            f"{decoder} has no derivative: its `levels` are no whole numbers, expected them "
            "rounded, with the gradient straight through"
        )
    if not found.requires_grad:
        return f"{decoder} has no derivative: its `levels` do not depend on a gradient"
    return extractor_without_derivative(extractor, images, found)


def extractor_without_derivative(
    extractor: FeatureExtractor, images: Tensor, levels: Tensor
) -> str | None:
    """The same of every extractor, at images as a decoder gives them and at their levels."""
    levels = levels.detach().requires_grad_(True)
    for one in getattr(extractor, "extractors", (extractor,)):
        name = f"the extractor {getattr(one, 'name', type(one).__name__)!r}"
        with torch.no_grad():
            expected = one(images).float()
        try:
            with torch.enable_grad():
                found = one(levels).float()
        except Exception as error:  # noqa: BLE001  (whatever a user's extractor raises)
            reason = " ".join(str(error).split())[:200]
            return f"{name} has no derivative: it takes bytes alone ({reason})"
        if not found.requires_grad:
            return f"{name} has no derivative: its features do not depend on a gradient"
        if float((found.detach() - expected).norm()) > ALIKE * float(expected.norm()):
            return f"{name} has no derivative: it reads whole numbers unlike the same bytes"
    return None


def pull_back(rollout: Rollout, latents: Tensor, cotangents: Tensor) -> Tensor:
    """The gradient of <features, cotangents> by the latents (B, C, h, w), rows (B, D) each.

    Decoder and extractor are differentiated for a few images at a time: a quarter of what they take
    at once without a gradient.
    """
    levels = rollout.autoencoder.levels  # type: ignore[attr-defined]
    chunks = [getattr(part, "chunk", None) for part in (rollout.autoencoder, rollout.extractor)]
    size = min([max(1, chunk // 4) for chunk in chunks if chunk], default=len(latents))
    parts = list[Tensor]()
    for x, rows in zip(
        torch.split(latents.detach(), size), torch.split(cotangents, size), strict=True
    ):
        x.requires_grad_(True)
        with torch.enable_grad():
            features = rollout.extractor(levels(x)).float()
        parts += torch.autograd.grad(against(features, rows.to(features)), x)
    return torch.cat(parts)


def made_again(evaluate: Velocity) -> Velocity:
    """The same with activation checkpointing: only its input is kept for the backward pass."""

    def call(x: Tensor, t: Tensor) -> Tensor:
        made: Tensor = checkpoint(evaluate, x, t, use_reentrant=False, preserve_rng_state=False)
        return made

    return call


class StepWatch:
    """Which images of a batch are finite after every step, and their gradients before it.

    Use as the `on_step` of a solver. What it notes stays on the device until it is asked.
    """

    def __init__(self) -> None:
        self._there: list[Tensor] = []  # (B,) bool a step
        self._back: list[tuple[int, Tensor]] = []

    def __call__(self, index: int, x: Tensor) -> None:
        """Note which of x (B, ...) are finite after step `index`, and listen for gradients."""
        if not x.requires_grad:
            raise ConfigError(
                "the network has no derivative: what it makes does not depend on a gradient; the "
                "searcher auto does without"
            )
        self._there.append(_finite(x))
        x.register_hook(partial(self._note, index))  # type: ignore[no-untyped-call]

    def _note(self, index: int, gradient: Tensor) -> None:
        self._back.append((index, _finite(gradient)))

    @property
    def images(self) -> int:
        """B."""
        return len(self._there[0]) if self._there else 0

    def problems(self) -> dict[int, str]:
        """Image -> the first step at which it, or else its gradient, ceased to be finite."""
        steps, found = len(self._there), dict[int, str]()
        looks = [(i, sound, "sample") for i, sound in enumerate(self._there)]
        looks += [(i, sound, "gradient") for i, sound in self._back]
        if not looks or bool(torch.stack([sound for _, sound, _ in looks]).all()):
            return found
        for index, sound, what in looks:
            for image in (~sound).nonzero()[:, 0].tolist():
                found.setdefault(image, f"{what} not finite after step {index + 1} of {steps}")
        return found


def _finite(x: Tensor) -> Tensor:
    return x.detach().flatten(1).isfinite().all(1)


def problems_of(watches: Sequence[StepWatch], features: Tensor) -> dict[int, str]:
    """Those of the parts that features (N, D) were made in, by the number of the image."""
    start, found = 0, dict[int, str]()
    for watch in watches:
        found |= {start + i: why for i, why in watch.problems().items()}
        start += watch.images
    for image in (~features.isfinite().all(1)).nonzero()[:, 0].tolist():
        found.setdefault(image, "features not finite")
    return found


BYTES: Final = 2**31  # of activations kept at a time on the CPU
SHARE: Final = 4  # of an accelerator's memory, one part


@dataclass(frozen=True)
class Room:
    """How much of the forward pass is kept for the backward pass at a time."""

    images: int  # in one call of the network
    kept: int  # calls of the network for one image that may all be kept


def room_for(rollout: Rollout, live: LiveModel) -> Room:
    """The room on the rollout's device, from what two images keep more than one does.

    It follows from the network and the size of the device alone, not from what is free at the
    moment: a resumed run sums in the same parts.
    """
    sampler = dataclasses.replace(rollout.sampler, num_steps=2, compile=False, precision="float32")
    short = rollout.with_sampler(sampler)
    one, two = (_kept_bytes(short, live, count) for count in (1, 2))
    each = max(1, two - one)
    room = max(1, _bytes_of(rollout.device) // each)
    return Room(images=min(rollout.batch, room), kept=room)


def _bytes_of(device: torch.device) -> int:
    if device.type != "cuda":
        return BYTES
    return int(torch.cuda.get_device_properties(device).total_memory) // SHARE


def _kept_bytes(rollout: Rollout, live: LiveModel, count: int) -> int:
    """Bytes of one evaluation of the guided network for so many images, the most of any."""
    sizes, calls = dict[int, int](), list[int]()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def through(evaluate: Velocity) -> Velocity:
        def call(x: Tensor, t: Tensor) -> Tensor:
            sizes.clear()
            # Each call alone: what it makes of weights is kept whatever the number of images.
            made = evaluate(x.detach().requires_grad_(True), t)
            calls.append(sum(sizes.values()))
            return made.detach()

        return call

    noise = rollout.noise(range(count)).to(rollout.device)
    labels = torch.zeros(count, dtype=torch.int64, device=rollout.device)
    with (
        live.gradients(),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        values = rollout.guidance
        sample_with(
            rollout.sampler, rollout.model, noise, labels, guide=rollout.guide, through=through,
            # With a gradient the guide is called whatever the strength.
            guidance=None if values is None else values.clone().requires_grad_(True),
        )  # fmt: skip
    return max(calls)
