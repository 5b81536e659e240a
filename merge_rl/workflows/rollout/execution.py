"""How a forward pass runs: precision, compilation, threads, streams, halved blocks."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from merge_rl.config import SamplerConfig
from merge_rl.core.sampling.compatibility import count_network_calls, has_open_end, prediction_of
from merge_rl.errors import ConfigError
from merge_rl.interfaces import Denoiser
from merge_rl.parallel.blocks import single_threaded
from merge_rl.workflows.rollout.compiled import FLOAT16, MANTISSA, Compiled


@dataclass(frozen=True)
class Failures:
    """Images without finite features, and whose doing it is.

    A rollout's row is NaN where the sample is not finite, and infinite where the sample is and the
    extractor's answer is not.
    """

    samples: int
    features: int
    count: int  # of all images

    @classmethod
    def of(cls, features: Tensor) -> Failures:
        """Those of the rows (N, D) of a rollout."""
        samples = int(features.isnan().all(1).sum())
        return cls(samples, int((~features.isfinite().all(1)).sum()) - samples, len(features))

    def __bool__(self) -> bool:
        return self.samples + self.features > 0

    def said(self, extractor: str) -> str:
        """A clause for a message."""
        parts = {
            "the model makes samples that are not finite": self.samples,
            f"the extractor {extractor} gives features that are not finite": self.features,
        }
        said = [f"{text} for {n:,} of {self.count:,} images" for text, n in parts.items() if n]
        return "; ".join(said)


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


def calls_an_image(settings: SamplerConfig, model: Denoiser) -> int:
    """Evaluations of the guided network an image takes; ConfigError for an adaptive solver."""
    return count_network_calls(
        settings.solver, settings.num_steps, prediction=prediction_of(model),
        open_end=has_open_end(model), last_step=settings.last_step,
    )  # fmt: skip


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

Transform = Callable[[Tensor], Tensor]


class Streams(Protocol):
    """Where the second stage runs, beside the first."""

    def beside(self, made: Tensor) -> AbstractContextManager[None]:
        """Work queued inside follows all that made `made`, and holds up nothing queued later."""
        ...

    def fetch(self, result: Tensor) -> Tensor:
        """A result of the second stage on the CPU, once it is done."""
        ...


class CudaStreams:
    """The current stream for the first stage, one of its own for the second."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def beside(self, made: Tensor) -> Iterator[None]:
        """The side stream, behind what the current one has queued so far."""
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        made.record_stream(self._side)  # or its memory may be taken again too early
        with torch.cuda.stream(self._side):
            yield

    def fetch(self, result: Tensor) -> Tensor:
        """Copied behind what the side stream has queued; the current one goes on meanwhile."""
        with torch.cuda.stream(self._side):
            return result.cpu()


def overlapped(
    makers: Iterable[Callable[[], Tensor]], finish: Transform, streams: Streams
) -> Iterator[Tensor]:
    """finish(make()) for every maker, in order, on the CPU.

    While a block is finished (decoded, features extracted) the next is being made. At most two
    blocks are under way, so that memory does not grow with their number.
    """
    waiting: deque[Tensor] = deque()
    for make in makers:
        made = make()
        with streams.beside(made):
            waiting.append(finish(made))
        if len(waiting) > 1:
            yield streams.fetch(waiting.popleft())
    while waiting:
        yield streams.fetch(waiting.popleft())


@contextlib.contextmanager
def threads(workers: int, blocks: int) -> Iterator[Callable[..., Iterable[Tensor]]]:
    """A map over blocks: in threads where there is a block for each, else one by one.

    Small networks on the CPU lose much of a second core to synchronisation inside operations;
    whole blocks side by side, each on one core, do not.
    """
    if workers < 2 or blocks < workers:
        yield map
        return
    with single_threaded(workers):
        pool = ThreadPoolExecutor(workers)
        try:
            yield pool.map
        finally:
            pool.shutdown(cancel_futures=True)
