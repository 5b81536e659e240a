"""Functions that a compiler makes faster, or that run as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from merge_rl.workflows.rollout.halving import is_out_of_memory

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
