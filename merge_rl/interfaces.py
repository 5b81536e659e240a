"""The interfaces between layers, as Protocols: anything with these methods fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor


PoolT = TypeVar("PoolT", contravariant=True)
"""What holds the generated images that rewards are measured in."""


class Denoiser(Protocol):
    """A denoising network: D(x; sigma, labels), the expected clean sample.

    Or, where its attribute `prediction` is "velocity", v(x, t, labels) of a path from noise (t = 0)
    to data (t = 1). `label_dim` (classes) and `null_label` (the id of no class) are looked at where
    a network has them.
    """

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        """x (B, C, h, w) at noise level sigma (0-dim or (B,)) -> D of the shape of x, float32."""
        ...


class Autoencoder(Protocol):
    """From the samples of a network to images.

    One that has a derivative offers it as `levels`: the same images as whole numbers of float32,
    differentiable straight through the rounding.
    """

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) float32 -> images (B, 1 or 3, H, W) uint8."""
        ...


class FeatureExtractor(Protocol):
    """From images to the features whose distribution is compared.

    One that has a derivative also takes whole numbers on 0..255 of float32 that require a gradient,
    and gives the same features.
    """

    name: str
    dim: int

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W) uint8 -> features (B, dim) float32."""
        ...


class Searcher(Protocol):
    """Proposes thetas and learns from their rewards (higher is better).

    What is asked is a function of the settings and of what was told, so that a restored searcher
    asks exactly what the interrupted one would have asked.
    """

    @property
    def done(self) -> bool:
        """Whether there is nothing left to ask; a method without an end never is."""
        ...

    def ask(self) -> Tensor:
        """The next population of thetas (P, D) float64; P may change from round to round.

        Asking again before telling gives the same.
        """
        ...

    def tell(self, thetas: Tensor, rewards: Tensor) -> None:
        """Rewards (P,) of thetas (P, D); NaN marks a failed candidate and ranks last."""
        ...

    @property
    def mean(self) -> Tensor:
        """The theta (D,) the searcher would report now."""
        ...

    @property
    def finalists(self) -> Mapping[str, Tensor]:
        """Thetas (D,) worth another look at the end, by what they are; `mean` is one of them."""
        ...

    def halve(self) -> None:
        """Every candidate of the last round failed: halve step and exploration."""
        ...

    def damp(self, factor: float) -> None:
        """The pool lags behind (factor < 1) or has caught up (> 1): take smaller, larger steps."""
        ...

    def recenter(self, theta: Tensor) -> None:
        """Go on from theta (D,): the mean proposed last yields samples that are not finite."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """{"tensors": {name: Tensor}, "scalars": {name: number or text}}: all to go on exactly."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        ...


class Reward(Protocol[PoolT]):
    """Scores candidates by the distribution of their images (higher is better)."""

    def pool_distance(self, pool: PoolT, /) -> float:
        """Distance of the pool itself to the real data; lower is closer."""
        ...

    def rewards(self, pool: PoolT, draws: Sequence[tuple[Tensor, Tensor]], /) -> Tensor:
        """Rewards (P,) float64 of P candidates, on the CPU.

        A draw is rows (n,) int64 of the pool and the features (P, n, D) of the images that each
        candidate made to stand in their place. NaN for a candidate with a feature that is not
        finite.
        """
        ...

    def state_dict(self, pool: PoolT, /) -> Mapping[str, Tensor]:
        """What beyond the pool a later process needs to give the same bits."""
        ...

    def load_state_dict(self, pool: PoolT, state: Mapping[str, Tensor], /) -> None:
        """Continue from a saved state of this pool."""
        ...


class Tracker(Protocol):
    """Hears of progress; prints, draws or forgets it."""

    def phase(self, name: str, total: int) -> None:
        """A phase begins that will take `total` units (images unless the name says otherwise)."""
        ...

    def advance(self, count: int) -> None:
        """`count` more units of the phase are done."""
        ...

    def event(self, event: Mapping[str, Any]) -> None:
        """A line of events.jsonl, as it is written."""
        ...


class NullTracker:
    """Forgets everything."""

    def phase(self, name: str, total: int) -> None:
        """Do nothing."""

    def advance(self, count: int) -> None:
        """Do nothing."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Do nothing."""
