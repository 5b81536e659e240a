"""What each permitted name makes of its arguments, what it refuses, and what that costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from merge_rl.errors import CheckpointError
from merge_rl.storage.pickles.machine import Machine, Record, require_tree
from merge_rl.storage.pickles.names import PERMITTED
from merge_rl.storage.pickles.spans import ByteSource, Cursor, Span
from merge_rl.storage.pickles.values import Budget, Global

ARRAY = Global("numpy.ndarray")
DTYPE = "numpy.dtype"
ENCODE = "_codecs.encode"
PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
FACTS = {"class_name": "Net", "type": "class", "version": 6, "state": {"a": 1}}
ORDERED, COUNTER = "collections.OrderedDict", "collections.Counter"
DEFAULT, SET, SIZE = "collections.defaultdict", "builtins.set", "torch.Size"
POSIX, DEVICE = "pathlib.PosixPath", "torch.device"


def machine(data: bytes = b".", **options: Any) -> Machine:
    source = ByteSource(data, "a.pkl")
    cursor = Cursor(Span(source, 0, source.size))
    return Machine(cursor, PERMITTED, Budget(source.name, source.size), **options)


def made(name: str, *args: object, by: Machine | None = None) -> Any:
    handler = PERMITTED[name]
    assert handler is not None
    return handler(args, by or machine())


@pytest.mark.parametrize(
    ("name", "args", "value", "cost"),
    [
        (ORDERED, (), {}, 0),
        (ORDERED, ([("a", 1), ["b", 2]],), {"a": 1, "b": 2}, 220),  # 110 a pair
        (DEFAULT, (), {}, 0),
        (DEFAULT, (None,), {}, 0),
        (DEFAULT, (Global("builtins.list"),), {}, 0),
        (COUNTER, (), {}, 0),
        (COUNTER, ({"a": 1},), {"a": 1}, 0),
        (POSIX, ("a", "bc"), "a/bc", 3),  # its characters
        (ENCODE, ("a\xe9", "latin1"), b"a\xe9", 2),
        (SET, (), set(), 0),
        (SET, ([1, "a", None],), {1, "a", None}, 330),  # 110 a member
        ("builtins.frozenset", ((1,),), frozenset({1}), 110),
        ("builtins.bytes", (), b"", 0),
        (SIZE, ((2, 3),), (2, 3), 0),
        (DEVICE, ("cpu",), "cpu", 0),
        (DEVICE, ("cuda", 1), "cuda", 0),
    ],
)
def test_what_a_name_makes_and_costs(name: str, args: Any, value: object, cost: int) -> None:
    reader = machine()
    before = reader.budget.left
    found = made(name, *args, by=reader)
    assert (found, type(found)) == (value, type(value))
    assert before - reader.budget.left == cost


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        (ORDERED, ({},), "other than a list of pairs"),
        (ORDERED, ([], []), "other than a list of pairs"),
        (ORDERED, ([("a",)],), "other than a list of pairs"),
        (ORDERED, ([("a", 1, 2)],), "other than a list of pairs"),
        (ORDERED, (["ab"],), "other than a list of pairs"),  # of two letters
        (ORDERED, ([((), 1)],), "expected text or a number as key, found 'tuple'"),
        (DEFAULT, (1,), "a default that is not a class"),
        (DEFAULT, (None, None), "a default that is not a class"),
        (COUNTER, ([],), "counts that are not made from a mapping"),
        (COUNTER, ({}, {}), "counts that are not made from a mapping"),
        (POSIX, ("a", 1), "a path of parts that are not text"),
        (ENCODE, ("a",), "not written as latin1"),
        (ENCODE, ("a", "latin1", "strict"), "not written as latin1"),
        (ENCODE, (b"a", "latin1"), "not written as latin1"),
        (ENCODE, ("a", "utf-8"), "not written as latin1"),
        (ENCODE, ("\u0100", "latin1"), "not written as latin1"),
        (SET, ([1], [2]), "other than a list"),
        (SET, ("ab",), "other than a list"),
        (SET, ([()],), "expected text or a number as key"),
        ("builtins.bytes", (3,), "bytes that are made from arguments"),
        (SIZE, (), "a size that is not made from a tuple"),
        (SIZE, ([2],), "a size that is not made from a tuple"),
        (SIZE, ((1,), (2,)), "a size that is not made from a tuple"),
        (DEVICE, (), "a device named by nothing"),
        (DEVICE, (1,), "a device named by a whole number"),
        (DTYPE, (), "an array of type nothing, expected"),
        (DTYPE, ("O8",), "an array of type O8, expected"),
        ("numpy.core.numeric._frombuffer", (b"", None, ()), "without bytes, type, shape and order"),
        ("numpy.core.numeric._frombuffer", (b"", None, (), "K"), "without bytes, type, shape and"),
        ("numpy.core.numeric._frombuffer", (b"", None, (), "C"), "an array of nothing, expected"),
        (PERSISTENT, (), "does not say its class"),
        (PERSISTENT, (FACTS, FACTS), "does not say its class"),
        (PERSISTENT, ("a",), "does not say its class"),
        (PERSISTENT, ({**FACTS, "class_name": 1},), "does not say its class"),
        (PERSISTENT, ({**FACTS, "type": "function"},), "not an instance of a class"),
        (PERSISTENT, ({**FACTS, "version": 5},), "in version 5 of its format, expected 6"),
        (PERSISTENT, ({**FACTS, "version": "6"},), "in version text of its format, expected 6"),
        (PERSISTENT, ({**FACTS, "version": 6.0},), "in version 'float' of its format, expected 6"),
    ],
)
def test_what_a_name_refuses(name: str, args: Any, told: str) -> None:
    with pytest.raises(CheckpointError, match=f"a.pkl: .*{told}"):
        made(name, *args)


def test_objects_with_their_own_source_are_records_without_it() -> None:
    found = made(PERSISTENT, {**FACTS, "module_src": "import os"})
    assert (found.kind, found.args, found.state) == ("persistent:Net", (), {"a": 1})


def test_settings_are_their_content_alone() -> None:
    setting = made("omegaconf.dictconfig.DictConfig", 1)
    with pytest.raises(CheckpointError, match="the state of a omegaconf.* is 'list'"):
        setting.build([], machine())
    setting.build({"_content": 1, "_parent": 2}, machine())
    assert (setting.args, setting.state) == ((1,), {"_content": 1})
    with pytest.raises(CheckpointError, match="the state of a omegaconf.* is given twice"):
        setting.build({}, machine())


PLAIN = (3, "<", None, None, None)


def dtype_of(code: str, order: str = "<") -> Any:
    return made(DTYPE, code, False, True).build((3, order, *PLAIN[2:], -1, -1, 0), machine())


@pytest.mark.parametrize("order", ["<", ">", "|", "="])
def test_types_of_plain_numbers(order: str) -> None:
    assert dtype_of("i2", order).dtype == np.dtype(">i2" if order == ">" else "<i2")
    assert made(DTYPE, "i2").build((3, order, None, None, None), machine()).order == order


@pytest.mark.parametrize(
    "state",
    [None, list(PLAIN), PLAIN[:4], (3, "x", *PLAIN[2:]), (3, None, *PLAIN[2:]),
     *((*PLAIN[:i], "a", *PLAIN[i + 1 :]) for i in (2, 3, 4))],
)  # fmt: skip
def test_types_of_anything_else_are_refused(state: object) -> None:
    with pytest.raises(CheckpointError, match="an array of i2 has a type that is not plain"):
        made(DTYPE, "i2").build(state, machine())


def test_arrays_are_made_of_their_bytes_row_by_row_or_column_by_column() -> None:
    data = np.arange(6, dtype="<i2").tobytes()
    name, reader = "numpy._core.numeric._frombuffer", machine()
    before = reader.budget.left
    rows = made(name, data, dtype_of("i2"), (2, 3), "C", by=reader)
    assert before - reader.budget.left == 400
    columns = made(name, data, dtype_of("i2"), (2, 3), "F")
    assert rows.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert columns.tolist() == [[0, 2, 4], [1, 3, 5]]
    array = made("numpy.core.multiarray._reconstruct", ARRAY)
    for column_major, expected in ((True, columns), (False, rows), (1, rows)):
        found = array.build((1, (2, 3), dtype_of("i2"), column_major, data), machine())
        np.testing.assert_array_equal(found, expected)
    assert made("numpy.core.multiarray.scalar", dtype_of("i2"), data[2:4]) == 1


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (None, "an array without shape, type and bytes"),
        ([1, (1,), None, False, b"ab"], "an array without shape, type and bytes"),
        ((1, (1,), None, False), "an array without shape, type and bytes"),
        ((1, (1,), None, False, b"ab"), "an array of nothing, expected plain numbers"),
        ((1, (1,), "i2", False, "ab"), "the content of an array is text, expected bytes"),
        ((1, [1], "i2", False, b"ab"), "an array whose shape is not a few whole numbers"),
        ((1, (2,), "i2", False, b"ab"), r"of shape \(2,\) and type int16 in 2 bytes"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(state: Any, told: str) -> None:
    array = made("numpy.core.multiarray._reconstruct", ARRAY)
    if isinstance(state, tuple) and state[2] == "i2":
        state = (*state[:2], dtype_of("i2"), *state[3:])
    with pytest.raises(CheckpointError, match=told):
        array.build(state, machine())


def test_what_was_announced_must_be_described_and_hold_no_circle() -> None:
    with pytest.raises(CheckpointError, match="a: an array or type was announced, but not desc"):
        require_tree([made(DTYPE, "i2")], "a")
    for inside in (True, False):
        record = Record("a")
        record.state, outer = ({"a": record} if inside else None), Record("b", (record,))
        if not inside:
            record.args = (outer,)
        with pytest.raises(CheckpointError, match="a: a value contains itself"):
            require_tree(outer, "a")
    require_tree(Record("a", ([1],), {"b": [2]}), "a")
