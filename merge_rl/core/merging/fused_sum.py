"""Weighted sums on a GPU in one pass over the sources, with the bits of `weighted_sum`.

A chain of tensor operations moves every partial sum through memory: 26 bytes for 2 of a float16
source. This kernel (Triton, which comes with torch's builds for GPUs) keeps them in registers:
what is read is the sources, what is written is the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK: Final = 4096  # elements a program sums
WARPS: Final = 8
WIDEST: Final = 16  # bytes of one access
SENT_BYTES: Final = 2**28  # of all sources together, sent to an accelerator at a time
TYPES: Final = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    pointers, coefficients, out, size, count: tl.constexpr, kind: tl.constexpr,
    aligned: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = places < size
    source = tl.multiple_of(tl.load(pointers).to(tl.pointer_type(kind)), aligned)
    value = tl.load(source + places, mask=inside).to(tl.float32)
    total = value * tl.load(coefficients)
    for k in range(1, count):
        source = tl.multiple_of(tl.load(pointers + k).to(tl.pointer_type(kind)), aligned)
        value = tl.load(source + places, mask=inside).to(tl.float32)
        total += value * tl.load(coefficients + k)
    tl.store(out + places, total, mask=inside)


def can_fuse(sources: Sequence[Tensor]) -> bool:
    """Whether `fused_sum` takes vectors of this kind: contiguous, and of one floating type."""
    first = sources[0].dtype
    return first in TYPES and all(s.dtype == first and s.is_contiguous() for s in sources)


def fused_sum(sources: Sequence[Tensor], coefficients: Sequence[float], out: Tensor) -> None:
    """out = sum_k coefficients[k] sources[k], each product and each sum rounded by itself.

    Args:
        sources: K >= 1 vectors (n,) on the device of `out` for which `can_fuse` holds.
        coefficients: K float32 numbers.
        out: (n,) float32, contiguous, overwritten; shares no memory with the sources. Its version
            counter notices, as that of a tensor which torch writes to.
    """
    size = out.numel()
    if size == 0:
        return
    addresses = [source.data_ptr() for source in sources]
    device: Any = out.device
    pointers = torch.tensor(addresses, dtype=torch.int64).to(device)
    factors = torch.tensor(coefficients, dtype=torch.float32).to(device)
    # Contraction to fused multiply-add would round once where the definition rounds twice.
    with torch.cuda.device(device):
        _kernel[(triton.cdiv(size, BLOCK),)](
            pointers, factors, out, size, len(addresses), kind=TYPES[sources[0].dtype],
            aligned=math.gcd(WIDEST, *addresses), block=BLOCK, num_warps=WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip
    torch.autograd.graph.increment_version(out)  # so that caches keyed by the version notice


def sum_parts(terms: Sequence[tuple[Tensor, float]], out: Tensor) -> bool:
    """Whether the sum of sources with coefficients could be made; those elsewhere go in parts."""
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
