"""Numbers as files store them into float32 and back, by numpy alone: the bits of IEEE 754.

Types are named as the safetensors format names them. NumPy's own casts between half and float
take each number by itself, four times as long as the integer operations on whole blocks here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from merge_rl.late import torch

Floats: TypeAlias = npt.NDArray[np.float32]
Raw: TypeAlias = npt.NDArray[Any]

_RAW: Final[Mapping[str, npt.DTypeLike]] = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.uint16, "BF16": np.uint16},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "BOOL": np.uint8},
    **{"U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8},
}
_SPREAD: Final = np.int32(-0x7000_2000)  # sign, and what is left of exponent and mantissa
_UP: Final = np.float32(2.0**112)  # the exponents of half count from 15, those of float from 127
_LARGE: Final = 2.0**15  # a coefficient that times 2^112 might not be a float32
_MOST_HALF: Final = 65520.0  # from here on half rounds to infinity


def raw_type(code: str) -> np.dtype[Any]:
    """What to read stored numbers into; 8-bit floats and what else NumPy lacks come as bytes."""
    return np.dtype(_RAW.get(code, np.uint8))


def finite_halves(raw: Raw) -> bool:
    """Whether no stored half (n,), given as its bits, is NaN or infinite."""
    return int(raw.max()) < 0xFC00 and int(raw.view(np.int16).max()) < 0x7C00


def widen(raw: Raw, code: str, out: Floats) -> None:
    """out = the stored numbers (n,) in float32, rounded once where they are wider.

    Of halves and bfloat16 only finite ones are exact, see `finite_halves`.
    """
    if _is_bits(raw, code):
        _spread_half(raw, out)
        np.multiply(out, _UP, out=out)
    else:
        _widen_others(raw, code, out)


def product(raw: Raw, code: str, coefficient: float, out: Floats) -> None:
    """out = coefficient times the stored numbers (n,) in float32, rounded once.

    `coefficient` is a float32 number.
    """
    factor = np.float32(coefficient)
    if _is_bits(raw, code) and abs(coefficient) < _LARGE:
        # The shift of the exponent goes into the factor: exact, so the product rounds as before.
        _spread_half(raw, out)
        factor = factor * _UP
    else:
        widen(raw, code, out)
    np.multiply(out, factor, out=out)


def _is_bits(raw: Raw, code: str) -> bool:
    return code == "F16" and raw.dtype == np.uint16


def _spread_half(raw: Raw, out: Floats) -> None:
    """out = half times 2^-112: exponent and mantissa where a float32 has them."""
    bits = out.view(np.int32)
    np.copyto(bits, raw.view(np.int16))
    np.left_shift(bits, np.int32(13), out=bits)
    np.bitwise_and(bits, _SPREAD, out=bits)


def _widen_others(raw: Raw, code: str, out: Floats) -> None:
    if code == "BF16":
        bits = out.view(np.uint32)
        np.copyto(bits, raw)
        np.left_shift(bits, np.uint32(16), out=bits)
    elif raw.dtype == np.float16 and "torch" in sys.modules:
        torch.from_numpy(out).copy_(torch.from_numpy(raw))
    elif code in _RAW:
        np.copyto(out, raw, casting="unsafe")
    else:
        np.take(_eight_bits(code), raw, out=out)


def _eight_bits(code: str) -> Floats:
    """All 256 numbers of an 8-bit float."""
    if code == "F8_E8M0":  # powers of two alone; not a type of every PyTorch
        powers: Floats = np.ldexp(np.float32(1), np.arange(-127, 128)).astype(np.float32)
        return np.append(powers, np.float32(np.nan))
    kinds = {
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    }  # fmt: skip
    found: Floats = torch.arange(256, dtype=torch.uint8).view(kinds[code]).float().numpy()
    return found


def narrow(values: Floats, code: str) -> Raw | None:
    """Finite float32 (n,) as F32, F16 or BF16, rounded to even; None where one becomes infinite."""
    if code == "F32":
        return values
    if code == "F16":
        return _halves(values)
    bits = values.view(np.uint32)
    odd = np.right_shift(bits, np.uint32(16))
    np.bitwise_and(odd, np.uint32(1), out=odd)
    np.add(odd, np.uint32(0x7FFF), out=odd)
    np.add(odd, bits, out=odd)
    np.right_shift(odd, np.uint32(16), out=odd)
    found = odd.astype(np.uint16)
    return None if bool(((found & 0x7F80) == 0x7F80).any()) else found


def _halves(values: Floats) -> Raw | None:
    """As `narrow`. |x| + 2^(e + 13), where 2^e <= |x|, has a unit of 2^(e - 10): that of a half."""
    size = np.absolute(values)
    if float(size.max(initial=0)) >= _MOST_HALF:
        return None
    bits = values.view(np.uint32)
    power = np.bitwise_and(bits, np.uint32(0x7F80_0000))
    np.maximum(power, np.uint32((127 - 14) << 23), out=power)  # below, halves are evenly spaced
    np.add(power, np.uint32(13 << 23), out=power)
    np.add(size, power.view(np.float32), out=size)
    rounded = size.view(np.uint32)
    np.subtract(rounded, power, out=rounded)  # |x| in units; the leading one is 2^10
    np.right_shift(power, np.uint32(13), out=power)
    np.add(rounded, power, out=rounded)
    np.subtract(rounded, np.uint32((127 + 13 - 14) << 10), out=rounded)
    np.right_shift(bits, np.uint32(16), out=power)
    np.bitwise_and(power, np.uint32(0x8000), out=power)
    np.bitwise_or(rounded, power, out=rounded)
    return rounded.astype(np.uint16)


def as_numbers(raw: Raw, code: str) -> Raw:
    """Halves as such, where their bits are not to be moved about.

    That is where torch is loaded, whose casts are as fast, and in a thread in which numbers below
    2^-126 are lost: some libraries, and torch.set_flush_denormal, switch processors to that.
    """
    if code != "F16":
        return raw
    kept = bool(np.multiply(np.float32(2.0**-140), np.ones(8, np.float32)).all())
    return raw if kept and "torch" not in sys.modules else raw.view(np.float16)
