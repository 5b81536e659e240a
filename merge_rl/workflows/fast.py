"""Reduced precision and compilation of a network's forward pass, for accelerators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from merge_rl.config import SamplerConfig
from merge_rl.core.compatibility import prediction_of
from merge_rl.errors import ConfigError
from merge_rl.interfaces import Denoiser


class Autocast:
    """A network whose matrix products run in bfloat16; what goes in and comes out is float32."""

    def __init__(self, forward: Denoiser, network: Denoiser) -> None:
        self.forward = forward
        # What samplers ask a network for.
        self.prediction = prediction_of(network)
        self.label_dim: int | None = getattr(network, "label_dim", None)
        self.null_label: int | None = getattr(network, "null_label", None)

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        """The network's prediction, float32."""
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return self.forward(x, sigma, labels).float()


def prepare_network(model: Denoiser, settings: SamplerConfig, device: torch.device) -> Denoiser:
    """The network as the settings want it: compiled, in bfloat16, or as it is.

    It stays the same module underneath, so that weights merged into it count. A network that has
    a half precision of its own on this device (EDM2's `use_fp16`) keeps it instead of bfloat16.
    Raises ConfigError for compilation on the CPU, where it costs more than it saves.
    """
    prepared = model
    if settings.compile:
        if device.type == "cpu":
            raise ConfigError("compile is for accelerators, got the device cpu")
        prepared = torch.compile(model)
    own_half = bool(getattr(model, "use_fp16", False)) and device.type == "cuda"
    if settings.precision == "bfloat16" and not own_half:
        prepared = Autocast(prepared, model)
    return prepared


@contextlib.contextmanager
def matmul_precision(settings: SamplerConfig) -> Iterator[None]:
    """Matrix products of float32 in TF32 where the settings say so; afterwards as before."""
    if settings.precision != "tf32":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
