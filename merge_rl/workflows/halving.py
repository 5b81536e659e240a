"""Fewer images at once where memory does not suffice, without starting over."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from merge_rl.errors import DeviceMemoryError


class Halving:
    """Applies a function of rows to as many rows at once as memory takes.

    Out of memory halves the number, from then on; rows that are done are kept. The result is that
    of all rows at once, up to the rounding of sums whose order a kernel chooses by its batch.
    """

    def __init__(self, announce: Callable[[str], None] = lambda _text: None) -> None:
        self.limit: int | None = None  # rows at once; None: as many as there are
        self.announce = announce

    def __call__(self, function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """function(*rows), rows (B, ...) each; DeviceMemoryError if one row is too many."""
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
            raise DeviceMemoryError("out of memory with one image at a time") from None
        # Threads may meet the same limit at the same time: one of them lowers it.
        self.limit = min(self.limit or size, math.ceil(size / 2))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.announce(f"out of memory with {size} images at once: {self.limit} from now on")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator, or the machine, had no room for a tensor."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
