"""FLOPs and memory of a network's forward pass, without running it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

PROBES: Final = (4, 8)  # batch sizes between which memory is taken for a straight line


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors made inside that are alive at the same time, at most.

    Counts storages, each once, from the operation that makes it until nothing refers to it: what
    an allocator must have, beside its own rounding and the workspace of kernels. What is `there`
    already, weights and inputs, does not count, nor do views of it.
    """

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@dataclass(frozen=True)
class Cost:
    """Of a forward pass: peak memory is fixed + per_image B for a batch of B."""

    flops: float  # an image; a multiplication and an addition count as two
    fixed: int
    per_image: float

    def peak(self, batch: int) -> int:
        """Bytes beside the weights."""
        return self.fixed + round(self.per_image * batch)


def forward_cost(
    build: Callable[[], nn.Module], inputs: Callable[[int], Iterable[Tensor]], device: str
) -> Cost:
    """Cost of build()(*inputs(B)) on a kind of device, which need not be there.

    Both are called where tensors have shapes but no values. A network that computes in half
    precision on some devices says on which (`half_on`).
    """
    peaks, flops = [], 0.0
    kind = torch.device(device).type
    with torch.device("meta"), torch.no_grad():
        for batch in PROBES:
            model = build().eval().requires_grad_(False)
            if kind in getattr(model, "half_on", ()):
                model.half_on = ("meta",)  # type: ignore[assignment]
            given = list(inputs(batch))
            there = [*model.parameters(), *model.buffers(), *given]
            with FlopCounterMode(display=False) as counter, LiveBytes(there) as memory:
                model(*given)
            flops = counter.get_total_flops() / batch
            peaks.append(memory.peak)
    slope = (peaks[1] - peaks[0]) / (PROBES[1] - PROBES[0])
    return Cost(flops, max(0, round(peaks[0] - slope * PROBES[0])), slope)


def weight_bytes(part: object) -> int:
    """Bytes of a module's parameters and buffers; 0 for what is no module."""
    if not isinstance(part, nn.Module):
        return 0
    return sum(t.numel() * t.element_size() for t in (*part.parameters(), *part.buffers()))
