"""Decoding beside sampling: on a stream of its own, compiled."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from merge_rl.config import SamplerConfig
from merge_rl.interfaces import Autoencoder
from merge_rl.models import LatentDecoder
from merge_rl.workflows.rollout.execution import CudaStreams, Transform, is_out_of_memory

# One second stream a device: libraries keep work space, 32 MiB on some GPUs, for every stream that
# ever called them, and memory that a stream has given back serves that stream alone.
_second_stream = functools.cache(CudaStreams)


def streams_of(device: torch.device) -> CudaStreams:
    """The same two streams of a device for all rollouts."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _second_stream(torch.device(device.type, index))


class Compiled:
    """A function of rows (B, ...), compiled for `size` rows at a time.

    One shape alone, so that it is compiled once: the last rows are filled up with copies whose
    results are left out. Fewer rows than `size`, as memory that has run out leaves them, are
    worked on as they are, by the function itself. So are all where it cannot be compiled (no
    compiler, an operation that it does not take): `announce` hears of that, once.
    """

    def __init__(self, function: Transform, size: int, announce: Callable[[str], None]) -> None:
        self._function, self._size, self._announce = function, size, announce
        self._fast: Transform | None = None
        self._failed = False

    def __call__(self, rows: Tensor) -> Tensor:
        """function(rows), to rounding, whatever became of the compiler."""
        if self._failed or len(rows) < self._size:
            return self._function(rows)
        missing = -len(rows) % self._size
        filled = torch.cat([rows, rows[:missing]]) if missing else rows
        try:
            parts = [self._one(part) for part in torch.split(filled, self._size)]
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._failed = True
            reason = " ".join(str(error).split())[:200]
            self._announce(f"decoding is not compiled ({type(error).__name__}: {reason})")
            return self._function(rows)
        return torch.cat(parts)[: len(rows)]

    def _one(self, rows: Tensor) -> Tensor:
        if self._fast is not None:
            return self._fast(rows)
        fast = torch.compile(self._function, dynamic=False)
        with warnings.catch_warnings():  # compilers muse about code that is not ours
            warnings.simplefilter("ignore")
            made: Tensor = fast(rows)
        self._fast = fast
        return made


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
    levels = Compiled(autoencoder.levels, autoencoder.chunk, announce)

    def decode(latents: Tensor) -> Tensor:
        with torch.no_grad():
            return levels(latents).to(torch.uint8)

    return decode
