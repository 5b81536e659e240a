"""As many rows at once as memory takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from merge_rl.errors import OutOfMemoryError

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
