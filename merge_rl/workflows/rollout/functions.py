"""Rollouts by a function of the user's: weights, seeds and labels to features, or to images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from merge_rl.config import SamplerConfig
from merge_rl.core.merging.live_model import LiveModel
from merge_rl.core.sampling.sampler import rounded_down
from merge_rl.errors import ConfigError
from merge_rl.interfaces import FeatureExtractor
from merge_rl.workflows.rollout.derivatives import (
    Room,
    StepWatch,
    extractor_without_derivative,
)
from merge_rl.workflows.rollout.differentiable import DifferentiableRollout
from merge_rl.workflows.rollout.rollout import MergedRollout, Rollout

Subject = nn.Module | Mapping[str, Tensor]
"""What a function is given: a network with the merged weights, or these by name."""


def as_tensor(made: Any) -> Any:
    """NumPy's numbers, in any byte order, as a tensor of their own; anything else as it is."""
    if not isinstance(made, np.ndarray) or made.dtype.kind not in "fiu":
        return made
    kind = made.dtype if made.dtype.itemsize <= 8 else np.dtype(np.float64)
    return torch.from_numpy(np.array(made, kind.newbyteorder("="), order="C"))


def is_plain(made: Tensor) -> bool:
    """Whether a tensor has its numbers in memory, one after another and real."""
    return made.layout == torch.strided and not (made.is_meta or made.is_complex())


def written(made: object) -> str:
    """What a function made, in a few words: its type, or type and shape of a tensor."""
    if not isinstance(made, Tensor):
        return type(made).__name__
    kind = made.dtype if made.layout == torch.strided else made.layout
    place = " without numbers" if made.is_meta else ""
    return f"{str(kind).removeprefix('torch.')} {tuple(made.shape)}{place}"


def _weights(subject: Subject) -> list[tuple[object, ...]]:
    """Where the weights lie, and how often they were written to."""
    tensors = subject.parameters() if isinstance(subject, nn.Module) else subject.values()
    return [(t.data_ptr(), t.dtype, t._version) if isinstance(t, Tensor) else (t,) for t in tensors]


class Generate(Protocol):
    """Makes what is compared with real data, one row a seed; deterministic."""

    def __call__(self, subject: Subject, seeds: Sequence[int], labels: Tensor, /) -> Tensor:
        """Network or weights, N seeds, labels (N,) int64 -> features (N, D) or images.

        Images (N, 1 or 3, H, W) are uint8, or floating on 0..255, which may carry a gradient.

        A row must be a function of the weights, its own seed and its own label, whatever the others
        of the call are.
        """
        ...


class AsTheyAre(nn.Module):
    """Stands for a decoder and an extractor where a function gives features itself."""

    name = ""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, features: Tensor) -> Tensor:
        """The same features, with a gradient where gradients are on."""
        return features if torch.is_grad_enabled() else features.detach()

    def decode(self, samples: Tensor) -> Tensor:
        """The same."""
        return samples

    levels = decode


class GivenImages:
    """Images that a function gives: bytes, or floating numbers on 0..255, rounded to these."""

    def decode(self, images: Tensor) -> Tensor:
        """(N, C, H, W) uint8."""
        return self.levels(images).to(torch.uint8) if images.is_floating_point() else images

    def levels(self, images: Tensor) -> Tensor:
        """The nearest whole numbers on 0..255, float32; straight through, see `rounded_down`."""
        return rounded_down(images.float().nan_to_num().clip(0, 255) + 0.5)


class GivenRollout(Rollout):
    """A rollout whose noise is the seeds themselves, and whose samples a function makes.

    What the function returns is checked at every call: floating features (N, D) of the dimension of
    the statistics, or with an extractor of images these (N, 1 or 3, H, W), bytes or floating on
    0..255. Raises ConfigError for anything else, for a first call of floating images that are all
    within -1..1, and for a function that changes the weights: merges are written into them.
    """

    _ranged = False  # whether a range was looked at

    def __init__(
        self,
        generate: Generate,
        subject: Subject,
        *,
        extractor: FeatureExtractor,
        batch: int,
        device: str = "cpu",
        on_images: Callable[[int], None] | None = None,
    ) -> None:
        self.generate, self.subject = generate, subject
        super().__init__(
            _nothing, (), sampler=SamplerConfig(),
            autoencoder=extractor if isinstance(extractor, AsTheyAre) else GivenImages(),
            extractor=extractor, batch=batch, device=device, on_images=on_images,
        )  # fmt: skip

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """The seeds, (N,) int64."""
        return torch.tensor(list(seeds), dtype=torch.int64)

    def latents(
        self,
        noise: Tensor,
        labels: Tensor,
        *,
        check_finite: bool = False,  # noqa: ARG002  (the function's steps are its own)
    ) -> Tensor:
        """What the function makes of seeds (B,) and labels (B,), checked."""
        before = _weights(self.subject)
        made: Tensor = as_tensor(
            self.generate(self.subject, noise.tolist(), labels.to(self.device))
        )
        if _weights(self.subject) != before:
            raise ConfigError(
                "generate changed the weights, or their type or place, as .half(), .to() and "
                "load_state_dict() do; expected them left as they are, or a copy changed"
            )
        self._check(made, len(noise))
        return made

    def _extract(self, latents: Tensor) -> Tensor:
        if not self.takes_features and latents.is_floating_point():
            return super()._extract(latents)
        rows = self.extractor(latents).float()
        # As `Failures` tells them: a function that gives features itself is the model's side.
        mark = float("nan" if self.takes_features else "inf")
        return rows.masked_fill(~rows.isfinite().all(1, keepdim=True), mark)

    def _check(self, made: object, count: int) -> None:
        if not isinstance(made, Tensor) or not is_plain(made):
            raise ConfigError(self._problem(count, written(made)))
        wanted = (count, self.extractor.dim)
        if self.takes_features:
            good = made.is_floating_point() and tuple(made.shape) == wanted
        else:
            known = made.dtype == torch.uint8 or made.is_floating_point()
            good = known and made.ndim == 4 and made.shape[1] in (1, 3) and len(made) == count
        if not good:
            raise ConfigError(self._problem(count, written(made)))
        if made.is_floating_point() and not (self.takes_features or self._ranged):
            self._ranged = True
            if made.numel() and float(made.detach().abs().max()) <= 1:  # a later black one may be
                found = f"{str(made.dtype).removeprefix('torch.')} within -1..1"
                raise ConfigError(self._problem(count, found))

    @property
    def takes_features(self) -> bool:
        """Whether the function gives features itself, and no images."""
        return isinstance(self.extractor, AsTheyAre)

    def _problem(self, count: int, found: str) -> str:
        if self.takes_features:
            expected = f"floating features ({count}, {self.extractor.dim}), as the statistics have"
        else:
            expected = f"images uint8, or floating on 0..255, ({count}, 1 or 3, H, W) for "
            expected += self.extractor.name
        hint = "; extractor=NAME makes features of images" if self.takes_features else ""
        return f"generate returned {found}, expected {expected}{hint}"


def _nothing(x: Tensor, _sigma: Tensor, _labels: Tensor | None = None, /) -> Tensor:
    return x


class GivenGradient(DifferentiableRollout):
    """The gradient through a function whose features have one, or its images and the extractor."""

    def _prepare(self) -> None:
        self._given = _given(self.merged)
        why = without_gradient(self._given, self.live)
        if why is not None:
            raise ConfigError(
                f"the searcher pathwise needs a gradient, but {why}; the searcher auto does without"
            )

    @property
    def room(self) -> Room:
        """A batch at a time, all of which is kept: the function's own memory is not known."""
        return self._room or Room(images=self.rollout.batch, kept=2**62)

    @property
    def calls(self) -> int:
        """One."""
        return 1

    def latents(
        self, noise: Tensor, labels: Tensor, _again: bool, watch: StepWatch,
        _guidance: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """What the function makes, once."""
        made = self._given.latents(noise, labels)
        watch(0, made)
        return made


def without_gradient(rollout: GivenRollout, live: LiveModel) -> str | None:
    """Why features of the function have no gradient by the weights; None if they have one."""
    labels, sets = torch.zeros(2, dtype=torch.int64), live.checkpoints
    shape = (sets.layout.num_groups, sets.num_checkpoints)
    live.set_coefficients(torch.full(shape, 1 / shape[1], dtype=torch.float64))
    with live.gradients(), torch.enable_grad():
        made = rollout.latents(rollout.noise([0, 1]), labels)
    return made_without_gradient(made, None if rollout.takes_features else rollout.extractor)


def made_without_gradient(made: Tensor, extractor: FeatureExtractor | None) -> str | None:
    """The same of what it made, features or images for the extractor."""
    if not made.is_floating_point():
        return "generate makes images of bytes, which have none: return floating ones on 0..255"
    if not made.requires_grad:
        return "what generate returns does not depend on one"
    if extractor is None:
        return None
    decoder = GivenImages()
    with torch.no_grad():
        return extractor_without_derivative(extractor, decoder.decode(made), decoder.levels(made))


def with_gradient(merged: MergedRollout, **options: object) -> DifferentiableRollout:
    """The rollout with its gradient, whatever makes its samples."""
    kind = GivenGradient if isinstance(merged.rollout, GivenRollout) else DifferentiableRollout
    return kind(merged, **options)  # type: ignore[arg-type]


def _given(merged: MergedRollout) -> GivenRollout:
    if not isinstance(
        merged.rollout, GivenRollout
    ):  # pragma: no cover (`with_gradient` sees to it)
        raise TypeError(f"expected a function's rollout, got {type(merged.rollout).__name__}")
    return merged.rollout
