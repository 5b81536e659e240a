"""The base of all networks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn


def against(made: Tensor, cotangent: Tensor) -> Tensor:
    """<made, cotangent>, a scalar whose gradient by `made` is the cotangent, bit for bit.

    Shapes must be equal. Handed to torch as it is, a cotangent makes it load its symbolic shapes,
    which takes a second the first time.
    """
    product: Tensor = (made * cotangent).sum()
    return product


class Network(nn.Module, ABC):
    """A denoising network with weights: a `Denoiser` that says what its samples look like."""

    # Whether a forward pass is the same operations on the same addresses for equal shapes, so that
    # it can be recorded as a CUDA graph.
    capturable: bool = False

    def kept(self) -> list[Tensor]:
        """What it keeps and what follows from its weights, brought up to date in place."""
        return []

    def derived_once(self) -> AbstractContextManager[None]:
        """Inside, what follows from weights alone is made once, for all calls with gradients.

        Leaving it takes the gradients of those values back to the weights, so that these have
        theirs only then. Weights must not change inside.
        """
        return nullcontext()

    @property
    @abstractmethod
    def sample_shape(self) -> tuple[int, ...]:
        """Of one sample; (C, H, W) of images and latents."""
