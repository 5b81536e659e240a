"""Precision and compilation of a network's forward pass, for accelerators."""

from __future__ import annotations

import contextlib
import threading
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


def fast_hint(settings: SamplerConfig, device: str) -> list[str]:
    """A note for who samples on a GPU the slow way; none else."""
    slow = settings.precision == "float32" and not settings.compile
    if torch.device(device).type != "cuda" or not slow:
        return []
    return ["--fast (compiled, bfloat16) makes several times as many images a second on a GPU"]


@contextlib.contextmanager
def matmul_precision(settings: SamplerConfig) -> Iterator[None]:
    """Matrix products and convolutions of float32 as the settings say; afterwards as before.

    In TF32 (10 bits of mantissa) with the precision "tf32", else exact: left to itself torch takes
    TF32 for convolutions on a GPU, and the same weights would give other images than on the CPU.
    """
    with _PRODUCTS.held(tf32=settings.precision == "tf32"):
        yield


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """No TF32, whatever the sampler says: for decoding and features, which scores rest on."""
    with _PRODUCTS.held(tf32=False):
        yield


class _Float32Products:
    """TF32 or not in all of the process, for any number of callers at once.

    Callers need not leave in the order in which they came (threads sample side by side, a
    generator may be closed late): the newest of those still inside says what holds, and the last
    to leave puts back what the first one found.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: dict[object, tuple[str, bool]] = {}  # in the order of coming
        self._found = "highest", True

    @contextlib.contextmanager
    def held(self, *, tf32: bool) -> Iterator[None]:
        caller = object()
        try:
            with self._lock:
                if not self._wanted:
                    allowed = torch.backends.cudnn.allow_tf32
                    self._found = torch.get_float32_matmul_precision(), allowed
                self._wanted[caller] = "high" if tf32 else "highest", tf32
                self._apply()
            yield
        finally:
            with self._lock:
                if self._wanted.pop(caller, None) is not None:  # Ctrl-C may come before it is in
                    self._apply()

    def _apply(self) -> None:
        products, convolutions = next(reversed(self._wanted.values()), self._found)
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


_PRODUCTS = _Float32Products()
