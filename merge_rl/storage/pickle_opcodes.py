"""The instructions of pickle protocols 0 to 5 that build data, one small function each.

Source: the format as documented in CPython's pickletools. Instructions that only make sense for
live objects (EXT1 to EXT4, NEXT_BUFFER, READONLY_BUFFER, OBJ, INST) are refused by name.
"""

from __future__ import annotations

import pickletools  # for the names of the instructions alone
from typing import Final

from merge_rl.storage.pickle_machine import OPCODE_COST, Machine
from merge_rl.storage.pickle_scalars import SCALARS, Opcode, constant, decode, number
from merge_rl.storage.pickle_values import kind_of

STOP: Final = ord(".")
HIGHEST_PROTOCOL: Final = 5
_CONTAINER_COST: Final = 250  # of an empty one and its first entries
_ENTRY_COST: Final = 110  # of one more key in a mapping or set


def run(machine: Machine) -> object:
    """Execute instructions up to STOP; the value they leave."""
    read_byte, spend, find = machine.cursor.byte, machine.budget.spend, OPCODES.get
    while (code := read_byte()) != STOP:
        spend(OPCODE_COST)
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
        values = [m.pop() for _ in range(count)]
        m.push(tuple(reversed(values)), 72)

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
    value, key = m.pop(), m.pop()
    _set_items(m, [key, value])


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
