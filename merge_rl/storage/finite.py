"""Whether stored numbers are finite, from their bits: no conversion, a few GB a second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

# Word of the same size, all bits but the sign, and the least magnitude that is not finite.
_FORMATS: Final[Mapping[torch.dtype, tuple[npt.DTypeLike, int, int]]] = {
    torch.float16: (np.uint16, 0x7FFF, 0x7C00),
    torch.bfloat16: (np.uint16, 0x7FFF, 0x7F80),
    torch.float32: (np.uint32, 0x7FFF_FFFF, 0x7F80_0000),
    torch.float64: (np.uint64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    torch.complex64: (np.uint32, 0x7FFF_FFFF, 0x7F80_0000),
    torch.float8_e5m2: (np.uint8, 0x7F, 0x7C),
    torch.float8_e4m3fn: (np.uint8, 0x7F, 0x7F),
}


def count_nonfinite(data: bytes, dtype: torch.dtype) -> int:
    """How many of the numbers in little-endian `data` are NaN or infinite; 0 for whole numbers."""
    if dtype not in _FORMATS or not data:
        return 0
    word, magnitude, limit = _FORMATS[dtype]
    values = np.frombuffer(data, dtype=word) & np.array(magnitude, dtype=word)
    return int((values >= limit).sum()) if int(values.max()) >= limit else 0
