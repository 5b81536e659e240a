"""NumPy arrays inside a pickle: rebuilt from their bytes, for plain numbers only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from merge_rl.storage.byte_source import Span
from merge_rl.storage.pickle_machine import Handler, Machine
from merge_rl.storage.pickle_values import (
    Global,
    Unbuilt,
    is_one_of,
    kind_of,
    shown,
    whole_numbers,
)

_CODES: Final = frozenset(
    ["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"]
)


class _DType(Unbuilt):
    """A dtype of plain numbers: its code first, the byte order with its state."""

    def __init__(self, code: str) -> None:
        super().__init__()
        self.code, self.order = code, "|"

    def build(self, state: object, machine: Machine) -> object:
        """Accept (version, byte order, nothing about fields...)."""
        order = state[1] if isinstance(state, tuple) and len(state) >= 5 else None
        plain = isinstance(state, tuple) and all(part is None for part in state[2:5])
        if not plain or not is_one_of(order, "<", ">", "|", "="):
            raise machine.refuse(f"an array of {self.code} has a type that is not plain numbers")
        self.order = str(order)
        return self

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(f"{'>' if self.order == '>' else '<'}{self.code}")


class _Array(Unbuilt):
    """An array that awaits its content."""

    def build(self, state: object, machine: Machine) -> object:
        """The array for (version, shape, dtype, column-major, bytes)."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise machine.refuse("an array without shape, type and bytes")
        _, shape, dtype, column_major, data = state
        return _array(machine, data, dtype, shape, "F" if column_major is True else "C")


def _array(
    m: Machine, data: object, dtype: object, shape: object, order: str
) -> npt.NDArray[np.generic]:
    """A read-only view of the bytes."""
    if not isinstance(dtype, _DType):
        raise m.refuse(f"an array of {kind_of(dtype)}, expected plain numbers")
    if not isinstance(data, (bytes, Span)):
        raise m.refuse(f"the content of an array is {kind_of(data)}, expected bytes")
    sizes = whole_numbers(shape)
    if sizes is None:
        raise m.refuse("an array whose shape is not a few whole numbers")
    found = dtype.dtype
    if math.prod(sizes) * found.itemsize != len(data):
        raise m.refuse(f"an array of shape {sizes} and type {found} in {len(data)} bytes")
    m.budget.spend(400)
    flat: npt.NDArray[np.generic] = np.frombuffer(bytes(data), dtype=found)
    return flat.reshape(sizes, order="F" if order == "F" else "C")


def _reconstruct(args: tuple[object, ...], m: Machine) -> object:
    kind = args[0] if args else None
    if not isinstance(kind, Global) or kind.name != "numpy.ndarray":
        raise m.refuse("an array of a class other than numpy.ndarray")
    return _Array()


def _from_buffer(args: tuple[object, ...], m: Machine) -> object:
    if len(args) != 4 or not is_one_of(args[3], "C", "F"):
        raise m.refuse("an array without bytes, type, shape and order")
    return _array(m, args[0], args[1], args[2], str(args[3]))


def _scalar(args: tuple[object, ...], m: Machine) -> object:
    if len(args) != 2:
        raise m.refuse("a number without type and bytes")
    return _array(m, args[1], args[0], (), "C").item()


def _dtype(args: tuple[object, ...], m: Machine) -> object:
    code = args[0] if args else None
    if not isinstance(code, str) or code not in _CODES:
        what = shown(code) if isinstance(code, str) else kind_of(code)
        raise m.refuse(f"an array of type {what}, expected plain numbers")
    return _DType(code)


NUMPY_NAMES: Final[Mapping[str, Handler | None]] = {
    "numpy.ndarray": None,
    "numpy.dtype": _dtype,
    # numpy 2 renamed numpy.core.
    **{f"numpy.{core}.multiarray._reconstruct": _reconstruct for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
}
