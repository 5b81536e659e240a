"""How a forward pass runs: precision, threads, streams, as many rows at once as memory takes."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from merge_rl.config import SamplerConfig
from merge_rl.core.sampling.compatibility import count_network_calls, has_open_end, prediction_of
from merge_rl.errors import OutOfMemoryError
from merge_rl.interfaces import Denoiser
from merge_rl.parallel.blocks import single_threaded


@dataclass(frozen=True)
class Failures:
    """Images without finite features, and which part of the rollout made them so.

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


def calls_an_image(settings: SamplerConfig, model: Denoiser) -> int:
    """Evaluations of the guided network an image takes; ConfigError for an adaptive solver."""
    return count_network_calls(
        settings.solver, settings.num_steps, prediction=prediction_of(model),
        open_end=has_open_end(model), last_step=settings.last_step,
    )  # fmt: skip


def fast_hint(settings: SamplerConfig, device: str) -> list[str]:
    """A note that recommends --fast for sampling on a GPU in float32; else none."""
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


# One second stream a device: libraries keep work space, 32 MiB on some GPUs, for every stream that
# ever called them, and memory that a stream has given back serves that stream alone.
_second_stream = functools.cache(CudaStreams)


def streams_of(device: torch.device) -> CudaStreams:
    """The same two streams of a device for all rollouts."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _second_stream(torch.device(device.type, index))


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


# What allocators say differs between devices and versions.
_SIGNS: Final = ("can't allocate memory", "not enough memory", "out of memory", "alloc_cpu")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator, or the machine, had no room for a tensor."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error).lower() for s in _SIGNS)


class BatchHalving:
    """Applies a function of rows to as many rows at once as memory takes.

    Out of memory halves the number, from then on; rows that are done are kept. The result is that
    of all rows at once, up to the rounding of sums whose order a kernel chooses by its batch.
    """

    def __init__(self, announce: Callable[[str], None] = lambda _text: None) -> None:
        self.limit: int | None = None  # rows at once; None: as many as there are
        self.announce = announce

    def __call__(self, function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """function(*rows), rows (B, ...) each; OutOfMemoryError if one row is too many."""
        count, parts, start = len(rows[0]), list[Tensor](), 0
        while start < count or not parts:
            size = min(self.limit or count, count - start)
            try:
                parts.append(function(*(x[start : start + size] for x in rows)))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(size)
            else:
                start += size
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _halve(self, size: int) -> None:
        if size <= 1:
            raise OutOfMemoryError("out of memory with one image at a time") from None
        # Threads may meet the same limit at the same time: one of them lowers it.
        self.limit = min(self.limit or size, math.ceil(size / 2))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.announce(f"out of memory with {size} images at once: {self.limit} from now on")
