"""The base of all networks."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn


class Network(nn.Module, ABC):
    """A denoising network with weights: a `Denoiser` that says what its samples look like."""

    @property
    @abstractmethod
    def sample_shape(self) -> tuple[int, ...]:
        """Of one sample; (C, H, W) of images and latents."""
