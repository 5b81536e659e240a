"""Networks and decoders as the settings want them: compiled, in bfloat16, or as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from merge_rl.config import SamplerConfig
from merge_rl.errors import ConfigError
from merge_rl.interfaces import Autoencoder, Denoiser
from merge_rl.models import LatentDecoder
from merge_rl.workflows.rollout.execution import Transform, is_out_of_memory

MANTISSA: Final = {"float32": 23, "tf32": 10, "bfloat16": 7}  # bits by precision
FLOAT16: Final = 10


class Compiled:
    """A function of tensors, compiled when it is first called.

    Where it cannot be compiled (no compiler, an operation that it does not take), or where the
    first result is not the function's to rounding, `announce` hears of it once and the function
    runs as it is from then on.

    Args:
        function: returns a tensor.
        what: it is called in the note, in the plural.
        announce: takes the note.
        digits: mantissa bits b of the coarsest numbers inside; the norms of both first results
            may be 2^(-b / 2) apart, relative to the function's.
        dynamic: as of torch.compile.
    """

    def __init__(
        self, function: Callable[..., Tensor], what: str, announce: Callable[[str], None],
        *, digits: int = 23, dynamic: bool | None = None,
    ) -> None:  # fmt: skip
        self.function, self._what, self._announce = function, what, announce
        self._allowed, self._dynamic = 2 ** (-digits / 2), dynamic
        self._fast: Callable[..., Tensor] | None = None
        self._failed = False

    def __getattr__(self, name: str) -> Any:
        """What samplers ask a network for, such as `prediction`."""
        return getattr(self.function, name)

    def __call__(self, *given: Tensor | None) -> Tensor:
        """function(*given), to rounding, whatever became of the compiler."""
        if self._failed:
            return self.function(*given)
        try:
            return self._first(given) if self._fast is None else self._fast(*given)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:200]
            self._give_up(f"not compiled ({type(error).__name__}: {reason})")
            return self.function(*given)

    def _first(self, given: Sequence[Tensor | None]) -> Tensor:
        fast = torch.compile(self.function, dynamic=self._dynamic)
        with warnings.catch_warnings():  # compilers muse about code that is not ours
            warnings.simplefilter("ignore")
            made: Tensor = fast(*given)
        with torch.no_grad():
            expected = self.function(*given).float()
            apart = float((made.float() - expected).norm())
            size = max(float(expected.norm()), torch.finfo(torch.float32).tiny)
        if apart > self._allowed * size:  # not NaN: images that fail are named elsewhere
            self._give_up(f"left as they are: compiled they are {apart / size:.2g} off")
            return self.function(*given)
        self._fast = fast
        return made

    def _give_up(self, why: str) -> None:
        self._failed = True
        self._announce(f"{self._what} are {why}")


class WholeChunks:
    """A compiled function of rows (B, ...), called with `size` rows at a time.

    One shape alone, so that it is compiled once: the last rows are filled up with copies whose
    results are left out. Fewer rows than `size`, as memory that has run out leaves them, are
    worked on as they are, by the function itself.
    """

    def __init__(self, compiled: Compiled, size: int) -> None:
        self._compiled, self._size = compiled, size

    def __call__(self, rows: Tensor) -> Tensor:
        """The function of all rows, to rounding."""
        if len(rows) < self._size:
            return self._compiled.function(rows)
        missing = -len(rows) % self._size
        filled = torch.cat([rows, rows[:missing]]) if missing else rows
        parts = [self._compiled(part) for part in torch.split(filled, self._size)]
        return torch.cat(parts)[: len(rows)]


class Autocast:
    """A network whose matrix products run in bfloat16; what goes in and comes out is float32."""

    def __init__(self, forward: Denoiser, network: Denoiser) -> None:
        self.forward = forward
        self._network = network

    def __getattr__(self, name: str) -> Any:
        """What samplers ask a network for, such as `prediction`."""
        return getattr(self._network, name)

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        """The network's prediction, float32."""
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return self.forward(x, sigma, labels).float()


def prepare_network(
    model: Denoiser,
    settings: SamplerConfig,
    device: torch.device,
    announce: Callable[[str], None] = lambda _text: None,
) -> Denoiser:
    """The network as the settings want it: compiled, in bfloat16, or as it is.

    It stays the same module underneath, so that weights merged into it count. A network that has
    a half precision of its own on this device (EDM2's `use_fp16`) keeps it instead of bfloat16.
    `announce` is told where it cannot be compiled. Raises ConfigError for compilation on the CPU:
    there it takes minutes for a quarter of the time, and PyTorch 2.13 gives an EDM2's embedding
    wrong numbers.
    """
    own_half = bool(getattr(model, "use_fp16", False)) and device.type == "cuda"
    prepared = model
    if settings.compile:
        if device.type == "cpu":
            raise ConfigError("sampler.compile is for accelerators, got the device cpu")
        digits = FLOAT16 if own_half else MANTISSA[settings.precision]
        prepared = Compiled(model, "calls of the network", announce, digits=digits)
    if settings.precision == "bfloat16" and not own_half:
        prepared = Autocast(prepared, model)
    return prepared


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
    if not isinstance(autoencoder, LatentDecoder) or device.type != "cuda":
        return autoencoder.decode
    if autoencoder.dtype != torch.bfloat16 or not settings.compile:
        return autoencoder.decode
    digits = MANTISSA["bfloat16"]
    compiled = Compiled(
        autoencoder.levels, "decoded images", announce, digits=digits, dynamic=False
    )
    levels = WholeChunks(compiled, autoencoder.chunk)

    def decode(latents: Tensor) -> Tensor:
        with torch.no_grad():
            return levels(latents).to(torch.uint8)

    return decode
