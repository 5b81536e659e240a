"""Weighted sums of long vectors, the same to the last bit on every machine."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

CHUNK = 1 << 18  # elements summed at a time: two float32 chunks of 1 MiB stay in the L2 cache
DEVICE_CHUNK = 1 << 24  # on an accelerator, where starting an operation costs more than memory
SENT_BYTES = 2**28  # of all sources together, sent to an accelerator at a time


def weighted_sum(
    sources: Sequence[Tensor], coefficients: Sequence[float] | Tensor, out: Tensor
) -> Tensor:
    """out = sum_k coefficients[k] sources[k], in float32, in the order of k; returns `out`.

    Args:
        sources: K vectors (n,) of any real dtype and device, not altered. Float64 is rounded to
            float32 first; the narrower types are exact in it.
        coefficients: K numbers, rounded to float32. Where one is 0 its source is not read.
        out: (n,) float32, overwritten; shares no memory with the sources.

    Each product and each sum is rounded once, by itself: IEEE 754 then leaves no choice, and
    neither the processor, the number of threads nor where the sources lie changes a bit. (A matrix
    product may fuse and reorder; it is a quarter faster at most, as reading the sources dominates.)
    On a GPU one kernel makes the whole sum where Triton is there, see `fused_sum`.
    """
    terms = [(s, c) for s, c in zip(sources, float32(coefficients), strict=True) if c != 0]
    if not terms:
        return out.zero_()
    if out.is_cuda and _one_pass(out.device) and _fused(terms, out):
        return out
    size = CHUNK if out.device.type == "cpu" else DEVICE_CHUNK
    term = torch.empty(min(size, out.numel()), device=out.device)
    for start in range(0, out.numel(), size):
        part = out[start : start + size]
        for k, (source, coefficient) in enumerate(terms):
            # In its own dtype: torch would convert before it sends, and send twice as much.
            given = source[start : start + size].to(out.device, non_blocking=True)
            add_product(part, given, coefficient, term, first=k == 0)
    return out


def _fused(terms: Sequence[tuple[Tensor, float]], out: Tensor) -> bool:
    """Whether the sum has been made by one kernel; sources elsewhere are sent in parts."""
    from merge_rl.core.merging.fused_sum import can_fuse, fused_sum

    sources, factors = zip(*terms, strict=True)
    if not can_fuse(sources):
        return False
    size = out.numel()
    if any(source.device != out.device for source in sources):
        size = max(1, min(size, SENT_BYTES // (len(sources) * sources[0].element_size())))
    for start in range(0, out.numel(), size or 1):
        part = slice(start, start + size)
        fused_sum([s[part].to(out.device, non_blocking=True) for s in sources], factors, out[part])
    return True


@functools.cache
def _one_pass(device: torch.device) -> bool:
    """Whether the kernel runs here: it needs Triton, a GPU that this knows, and a C compiler."""
    if find_spec("triton") is None:
        return False
    try:
        from merge_rl.core.merging.fused_sum import fused_sum

        found = torch.zeros(2, device=device)
        fused_sum([torch.ones(2, device=device)] * 2, [0.5, 2.0], found)
        return found.tolist() == [2.5, 2.5]
    except Exception:  # noqa: BLE001  (whatever is missing, the chain of operations needs none of it)
        return False


def add_product(
    out: Tensor, source: Tensor, coefficient: float, term: Tensor, *, first: bool
) -> None:
    """out += coefficient source, or out = coefficient source if it is the `first` of a sum.

    All (n,), `out` and `term` (at least (n,), overwritten) in float32; `coefficient` is a float32
    number. Two operations on purpose: one that multiplies and adds may round once or twice,
    depending on the machine.
    """
    target = out if first else term[: out.numel()]
    target.copy_(source).mul_(coefficient)
    if not first:
        out.add_(target)


def float32(coefficients: Sequence[float] | Tensor) -> list[float]:
    """The nearest float32 numbers."""
    values: list[float] = torch.as_tensor(coefficients, dtype=torch.float32).tolist()
    return values
