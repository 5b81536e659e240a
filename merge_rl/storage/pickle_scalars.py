"""The instructions of pickle protocols that put a number, a text or bytes on the stack."""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from typing import Final, TypeAlias

from merge_rl.storage.pickle_machine import Machine
from merge_rl.storage.pickle_values import MAX_INTEGER_BYTES, MAX_TEXT_BYTES

Opcode: TypeAlias = Callable[[Machine], None]


def number(m: Machine, size: int, *, signed: bool = False) -> int:
    if size == 1 and not signed:
        return m.cursor.byte()
    return int.from_bytes(m.cursor.take(size), "little", signed=signed)


# -------------------------------------------------------------------------- numbers and constants


def constant(value: object) -> Opcode:
    return lambda m: m.push(value)


def _integer(size: int, *, signed: bool) -> Opcode:
    return lambda m: m.push(number(m, size, signed=signed))


def _long(size: int) -> Opcode:
    def step(m: Machine) -> None:
        length = number(m, size)
        if length > MAX_INTEGER_BYTES:
            raise m.refuse(f"a number of {length} bytes, at most {MAX_INTEGER_BYTES} are read")
        m.push(number(m, length, signed=True), length)

    return step


def _text_integer(m: Machine) -> None:
    text = m.cursor.line()
    if text in (b"00", b"01"):  # how protocol 0 writes false and true
        m.push(text == b"01")
        return
    digits = text.removesuffix(b"L").removeprefix(b"-")
    if not digits.isdigit() or len(digits) > 2 * MAX_INTEGER_BYTES:
        raise m.refuse("a number that is not written in digits")
    m.push(int(text.removesuffix(b"L")), len(digits))


def _text_float(m: Machine) -> None:
    try:
        m.push(float(m.cursor.line()))
    except ValueError:
        raise m.refuse("a number that is not written as one") from None


def _float(m: Machine) -> None:
    m.push(struct.unpack(">d", m.cursor.take(8))[0])


# --------------------------------------------------------------------------------- text and bytes


def decode(m: Machine, data: bytes, encoding: str) -> str:
    """Text from bytes; `encoding` is one of ours, never one that the file names."""
    m.budget.spend(64 + 4 * len(data))
    try:
        return codecs.decode(data, encoding, "surrogatepass" if encoding == "utf-8" else "strict")
    except UnicodeError:
        raise m.refuse(f"text that is not {encoding}") from None


def _text(size: int, encoding: str = "utf-8") -> Opcode:
    def step(m: Machine) -> None:
        length = number(m, size)
        m.cursor.require(length)
        if length > MAX_TEXT_BYTES:
            raise m.refuse(f"a text of {length} bytes, at most {MAX_TEXT_BYTES} are read")
        m.push(decode(m, m.cursor.take(length), encoding))

    return step


def _quoted(m: Machine) -> None:
    text = m.cursor.line()
    if len(text) < 2 or text[:1] not in (b"'", b'"') or text[-1:] != text[:1] or b"\\" in text:
        raise m.refuse("a quoted text that is not plain")
    m.push(decode(m, text[1:-1], "ascii"))


def _short_bytes(m: Machine) -> None:
    m.push(m.cursor.take(number(m, 1)), 300)


def _bytes(size: int) -> Opcode:
    return lambda m: m.push(m.take_span(number(m, size)))


SCALARS: Final[dict[str, Opcode]] = {
    **{"NONE": constant(None), "NEWTRUE": constant(True), "NEWFALSE": constant(False)},
    **{"BININT": _integer(4, signed=True), "LONG1": _long(1), "LONG4": _long(4)},
    **{"BININT1": _integer(1, signed=False), "BININT2": _integer(2, signed=False)},
    **{"INT": _text_integer, "LONG": _text_integer, "FLOAT": _text_float, "BINFLOAT": _float},
    **{"SHORT_BINUNICODE": _text(1), "BINUNICODE": _text(4), "BINUNICODE8": _text(8)},
    # Text as Python 2 wrote it.
    **{"SHORT_BINSTRING": _text(1, "ascii"), "BINSTRING": _text(4, "ascii"), "STRING": _quoted},
    "UNICODE": lambda m: m.push(decode(m, m.cursor.line(), "raw-unicode-escape")),
    **{"SHORT_BINBYTES": _short_bytes, "BINBYTES": _bytes(4), "BINBYTES8": _bytes(8)},
    "BYTEARRAY8": _bytes(8),
}
