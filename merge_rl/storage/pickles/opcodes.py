"""The instructions of pickle protocols 0 to 5 that build data, one small function each.

Source: the format as documented in CPython's pickletools. Instructions that only make sense for
live objects (EXT1 to EXT4, NEXT_BUFFER, READONLY_BUFFER, OBJ, INST) are refused by name.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from typing import Final, TypeAlias

from merge_rl.storage.pickles.machine import OPCODE_COST, Machine
from merge_rl.storage.pickles.values import MAX_INTEGER_BYTES, MAX_TEXT_BYTES, kind_of

STOP: Final = ord(".")
HIGHEST_PROTOCOL: Final = 5
_CONTAINER_COST: Final = 250  # of an empty one and its first entries
_ENTRY_COST: Final = 110  # of one more key in a mapping or set


def run(machine: Machine) -> object:
    """Execute instructions up to STOP; the value they leave."""
    read_byte, budget, find = machine.cursor.byte, machine.budget, OPCODES.get
    while (code := read_byte()) != STOP:
        budget.left -= OPCODE_COST  # `spend` in place: a call an instruction counts
        if budget.left < 0:
            budget.spend(0)
        step = find(code)
        if step is None:
            what = _NAMES.get(code, f"byte 0x{code:02x}")
            raise machine.refuse(f"expected an instruction that builds data, found {what}")
        step(machine)
    value = machine.pop()
    if machine.stack:
        raise machine.refuse(f"{len(machine.stack)} values are left over at its end")
    return value


# ------------------------------------------------------------------------------------- containers


def _tuple(count: int) -> Opcode:
    def step(m: Machine) -> None:
        m.push(tuple(m.pop_last(count)), 72)

    return step


def _marked_list(m: Machine) -> None:
    m.push(m.pop_mark(), _CONTAINER_COST)


def _marked_tuple(m: Machine) -> None:
    m.push(tuple(m.pop_mark()), 72)


def _marked_dict(m: Machine) -> None:
    values = m.pop_mark()
    m.push({}, _CONTAINER_COST)
    _set_items(m, values)


def _pop_mark(m: Machine) -> None:
    m.pop_mark()


def _append(m: Machine) -> None:
    _extend(m, [m.pop()])


def _appends(m: Machine) -> None:
    _extend(m, m.pop_mark())


def _extend(m: Machine, values: list[object]) -> None:
    target = m.top()
    if not isinstance(target, list):
        raise m.refuse(f"values are appended to {kind_of(target)}")
    m.budget.spend(10 * len(values))
    target.extend(values)


def _set_item(m: Machine) -> None:
    _set_items(m, m.pop_last(2))


def _set_items(m: Machine, values: list[object]) -> None:
    target = m.top()
    if not isinstance(target, dict) or len(values) % 2:
        raise m.refuse(f"keys and values are put into {kind_of(target)}")
    keys = values[::2]
    m.budget.require_keys(keys)
    m.budget.spend(_ENTRY_COST * len(keys))
    target.update(zip(keys, values[1::2], strict=True))


def _add_items(m: Machine) -> None:
    values, target = m.pop_mark(), m.top()
    if not isinstance(target, set):
        raise m.refuse(f"members are added to {kind_of(target)}")
    target.update(_members(m, values))


def _frozen_set(m: Machine) -> None:
    m.push(frozenset(_members(m, m.pop_mark())), _CONTAINER_COST)


def _members(m: Machine, values: list[object]) -> list[object]:
    m.budget.require_keys(values)
    m.budget.spend(_ENTRY_COST * len(values))
    return values


# ------------------------------------------------------------------------- names, calls, the memo


def _global(m: Machine) -> None:
    module, name = (decode(m, m.cursor.line(), "utf-8") for _ in range(2))
    m.find(module, name)


def _stack_global(m: Machine) -> None:
    name, module = m.pop(), m.pop()
    m.find(module, name)


def _reduce(m: Machine) -> None:
    args, target = m.pop(), m.pop()
    m.push(m.call(target, args))


def _new_with_keywords(m: Machine) -> None:
    keywords, args, target = m.pop(), m.pop(), m.pop()
    if not (isinstance(keywords, dict) and not keywords):
        raise m.refuse("an object is made with keyword arguments, which no checkpoint does")
    m.push(m.call(target, args))


def _old_instance(m: Machine) -> None:
    _global(m)  # so that a forbidden name is reported as such
    raise m.refuse("an old-style instance, which no checkpoint has")


def _text_key(m: Machine) -> int:
    text = m.cursor.line()
    if not text.isdigit() or len(text) > 12:
        raise m.refuse("a number of a value that is not written in digits")
    return int(text)


def _frame(m: Machine) -> None:
    m.cursor.require(number(m, 8))


def _protocol(m: Machine) -> None:
    found = number(m, 1)
    if found > HIGHEST_PROTOCOL:
        raise m.refuse(f"pickle protocol {found}, at most {HIGHEST_PROTOCOL} is known")


def _bytes(size: int) -> Opcode:
    return lambda m: m.push(m.take_span(number(m, size)))


def _float(m: Machine) -> None:
    m.push(struct.unpack(">d", m.cursor.take(8))[0])


def _integer(size: int, *, signed: bool) -> Opcode:
    return lambda m: m.push(number(m, size, signed=signed))


def _long(size: int) -> Opcode:
    def step(m: Machine) -> None:
        length = number(m, size)
        if length > MAX_INTEGER_BYTES:
            raise m.refuse(f"a number of {length} bytes, at most {MAX_INTEGER_BYTES} are read")
        m.push(number(m, length, signed=True), length)

    return step


def _quoted(m: Machine) -> None:
    text = m.cursor.line()
    if len(text) < 2 or text[:1] not in (b"'", b'"') or text[-1:] != text[:1] or b"\\" in text:
        raise m.refuse("a quoted text that is not plain")
    m.push(decode(m, text[1:-1], "ascii"))


def _short_bytes(m: Machine) -> None:
    m.push(m.cursor.take(number(m, 1)), 300)


def _text(size: int, encoding: str = "utf-8") -> Opcode:
    def step(m: Machine) -> None:
        length = number(m, size)
        m.cursor.require(length)
        if length > MAX_TEXT_BYTES:
            raise m.refuse(f"a text of {length} bytes, at most {MAX_TEXT_BYTES} are read")
        m.push(decode(m, m.cursor.take(length), encoding))

    return step


def _text_float(m: Machine) -> None:
    try:
        m.push(float(m.cursor.line()))
    except ValueError:
        raise m.refuse("a number that is not written as one") from None


def _text_integer(m: Machine) -> None:
    text = m.cursor.line()
    if text in (b"00", b"01"):  # how protocol 0 writes false and true
        m.push(text == b"01")
        return
    digits = text.removesuffix(b"L").removeprefix(b"-")
    if not digits.isdigit() or len(digits) > 2 * MAX_INTEGER_BYTES:
        raise m.refuse("a number that is not written in digits")
    m.push(int(text.removesuffix(b"L")), len(digits))


# -------------------------------------------------------------------------- numbers and constants


def constant(value: object) -> Opcode:
    """An instruction that pushes `value`."""
    return lambda m: m.push(value)


# --------------------------------------------------------------------------------- text and bytes


def decode(m: Machine, data: bytes, encoding: str) -> str:
    """Text from bytes; `encoding` is one of ours, never one that the file names."""
    m.budget.spend(64 + 4 * len(data))
    try:
        return data.decode(encoding, "surrogatepass" if encoding == "utf-8" else "strict")
    except UnicodeError:
        raise m.refuse(f"text that is not {encoding}") from None


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


def number(m: Machine, size: int, *, signed: bool = False) -> int:
    """The next `size` bytes as a little-endian whole number."""
    if size == 1 and not signed:
        return m.cursor.byte()
    return int.from_bytes(m.cursor.take(size), "little", signed=signed)


NAMED: Final[dict[str, Opcode]] = {
    **SCALARS,
    **{"EMPTY_TUPLE": constant(()), "TUPLE1": _tuple(1), "TUPLE2": _tuple(2), "TUPLE3": _tuple(3)},
    **{"TUPLE": _marked_tuple, "LIST": _marked_list, "DICT": _marked_dict},
    "EMPTY_LIST": lambda m: m.push([], _CONTAINER_COST),
    "EMPTY_DICT": lambda m: m.push({}, _CONTAINER_COST),
    "EMPTY_SET": lambda m: m.push(set(), _CONTAINER_COST),
    **{"APPEND": _append, "APPENDS": _appends, "SETITEM": _set_item, "ADDITEMS": _add_items},
    **{"SETITEMS": lambda m: _set_items(m, m.pop_mark()), "FROZENSET": _frozen_set},
    **{"MARK": Machine.push_mark, "POP": Machine.pop_or_mark, "POP_MARK": _pop_mark},
    "DUP": lambda m: m.push(m.top()),
    **{"PUT": lambda m: m.put(_text_key(m)), "GET": lambda m: m.get(_text_key(m))},
    **{"BINPUT": lambda m: m.put(number(m, 1)), "BINGET": lambda m: m.get(number(m, 1))},
    **{"LONG_BINPUT": lambda m: m.put(number(m, 4)), "LONG_BINGET": lambda m: m.get(number(m, 4))},
    **{"MEMOIZE": Machine.put, "BUILD": Machine.build, "FRAME": _frame, "PROTO": _protocol},
    **{"GLOBAL": _global, "STACK_GLOBAL": _stack_global, "REDUCE": _reduce, "NEWOBJ": _reduce},
    **{"NEWOBJ_EX": _new_with_keywords, "INST": _old_instance},
    "BINPERSID": lambda m: m.resolve_persistent(m.pop()),
    "PERSID": lambda m: m.resolve_persistent(decode(m, m.cursor.line(), "utf-8")),
}
_NAMES: Final = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
OPCODES: Final = {code: NAMED[name] for code, name in _NAMES.items() if name in NAMED}

Opcode: TypeAlias = Callable[[Machine], None]
