"""Decoding beside sampling: on a stream of its own, compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from merge_rl.config import SamplerConfig
from merge_rl.interfaces import Autoencoder
from merge_rl.models import LatentDecoder
from merge_rl.workflows.rollout.compiled import MANTISSA, Compiled, WholeChunks
from merge_rl.workflows.rollout.execution import CudaStreams, Transform

# One second stream a device: libraries keep work space, 32 MiB on some GPUs, for every stream that
# ever called them, and memory that a stream has given back serves that stream alone.
_second_stream = functools.cache(CudaStreams)


def streams_of(device: torch.device) -> CudaStreams:
    """The same two streams of a device for all rollouts."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _second_stream(torch.device(device.type, index))


def prepare_decoder(
    autoencoder: Autoencoder,
    settings: SamplerConfig,
    device: torch.device,
    announce: Callable[[str], None] = lambda _text: None,
) -> Transform:
    """Latents (B, C, h, w) -> images uint8, the fastest way that the settings allow on the device.

    A latent decoder in bfloat16 on a GPU is compiled where the network is; channels last made it
    slower. One in float32 stays as it is, so that scores agree with the CPU's.
    """

    def plain(latents: Tensor) -> Tensor:
        return autoencoder.decode(latents)

    if not isinstance(autoencoder, LatentDecoder) or device.type != "cuda":
        return plain
    if autoencoder.dtype != torch.bfloat16 or not settings.compile:
        return plain
    digits = MANTISSA["bfloat16"]
    compiled = Compiled(
        autoencoder.levels, "decoded images", announce, digits=digits, dynamic=False
    )
    levels = WholeChunks(compiled, autoencoder.chunk)

    def decode(latents: Tensor) -> Tensor:
        with torch.no_grad():
            return levels(latents).to(torch.uint8)

    return decode
