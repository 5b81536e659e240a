"""Pickles as data: equal to what the standard reader gives, and nothing but data."""

from __future__ import annotations

import argparse
import os
import pickle
import pickletools
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from merge_rl.errors import CheckpointError
from merge_rl.storage.pickles import values
from merge_rl.storage.pickles.machine import Record
from merge_rl.storage.pickles.opcodes import NAMED
from merge_rl.storage.pickles.reading import read_data, read_pickle
from merge_rl.storage.pickles.spans import Span
from merge_rl.storage.pickles.values import MAX_DEPTH, MAX_NODES, MAX_NUMBER_KEYS, Global

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
REFUSED = {"OBJ", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}

shared = ["shared"]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 255, 256, 65535, 65536, -(2**31), 2**31, 2**63, -(2**80),
    0.0, -0.5, 1e300, float("inf"), float("-inf"),
    "", "plain", "Fréchet ∇ 😀", "line\nfeed \\ 'quoted'", "x" * 300, "y" * 50_000,
    (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [1, [2, [3]]], {}, {"a": {"b": (1, None)}},
    {1: "one", 2.5: "float", None: "none"}, set(), {1, 2, "three"},
    frozenset({"a", "b"}), [shared, shared, {"again": shared}],
    {f"key{i}": [i, float(i)] for i in range(1200)}, list(range(3000)),
]  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values_equal_those_of_the_standard_reader(protocol: int) -> None:
    for value in VALUES:
        data = pickle.dumps(value, protocol=protocol)
        found = read_pickle(data)
        assert found == value
        assert type(found) is type(value)
        # Without the memo's unused entries other numbers are referred to.
        assert read_pickle(pickletools.optimize(data)) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_bytes_of_any_length(protocol: int) -> None:
    for value in (b"", b"\x00\xff" * 10, bytes(range(256)) * 100):
        found: Any = read_pickle(pickle.dumps([value], protocol=protocol))
        assert bytes(found[0]) == value
    long = read_pickle(pickle.dumps(b"z" * 5000, protocol=4))
    assert isinstance(long, Span)
    assert len(long) == 5000


def test_shared_values_stay_shared() -> None:
    found: Any = read_pickle(pickle.dumps([shared, shared]))
    assert found[0] is found[1]


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize(
    "dtype", ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1", "c8", ">f4"]
)
def test_arrays(dtype: str, protocol: int) -> None:
    flat = np.arange(1, 25).astype(dtype)
    for value in (
        flat,
        flat.reshape(2, 3, 4),
        flat.reshape(4, 6).T,
        flat[:0],
        flat[3:4].reshape(()),
    ):
        found: Any = read_pickle(pickle.dumps({"a": value, "b": value}, protocol=protocol))
        np.testing.assert_array_equal(found["a"], value)
        assert found["a"].dtype == value.dtype
        assert found["a"] is found["b"]
        assert not found["a"].flags.writeable
    scalar = read_pickle(pickle.dumps(flat[5], protocol=protocol))
    assert scalar == flat[5].item()


def test_arrays_of_numpy_1_have_other_names() -> None:
    data = pickle.dumps(np.arange(3.0), protocol=3)
    assert b"numpy._core.multiarray" in data
    found = read_pickle(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    np.testing.assert_array_equal(np.asarray(found), np.arange(3.0))


@pytest.mark.parametrize("value", [np.array([{}, []], object), np.zeros(2, "f4,i4"), np.array("a")])
def test_arrays_of_anything_but_numbers_are_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match="expected plain numbers"):
        read_pickle(pickle.dumps(value, protocol=4))


@pytest.mark.parametrize("protocol", [2, 4])
def test_known_classes_become_dicts_and_records(protocol: int) -> None:
    ordered = OrderedDict(a=1)
    ordered._metadata = {"version": 1}  # type: ignore[attr-defined] # as torch's state dicts
    container = nn.ModuleDict()
    value = [ordered, argparse.Namespace(lr=0.1), container, OrderedDict]
    found: Any = read_pickle(pickle.dumps(value, protocol=protocol))
    assert found[0] == {"a": 1}
    assert type(found[0]) is dict
    assert (found[1].kind, found[1].state) == ("argparse.Namespace", {"lr": 0.1})
    assert isinstance(found[2], Record)
    state: Any = found[2].state
    assert state["_modules"] == {}
    assert found[3] == Global("collections.OrderedDict")


def test_every_instruction_is_known_or_refused() -> None:
    every = {opcode.name for opcode in pickletools.opcodes}
    assert set(NAMED) | REFUSED | {"STOP"} == every
    assert not set(NAMED) & REFUSED
    for opcode in pickletools.opcodes:
        if opcode.name in REFUSED:
            with pytest.raises(CheckpointError, match=f"builds data, found {opcode.name}"):
                read_pickle(b"(" + opcode.code.encode("latin1") + b"\x01\x00\x00\x00.")


def test_files_are_read_through_a_small_window(tmp_path: Path) -> None:
    # Texts and bytes of all lengths around the window: none may be cut at its edge.
    value = [("t" * n, bytes(n)) for n in [0, 1, 255, 256, 16_383, 16_384, 16_385, 50_000]] * 3
    path = tmp_path / "value.pkl"
    path.write_bytes(pickle.dumps(value, protocol=4))
    found: Any = read_data(path)
    assert [(text, bytes(part)) for text, part in found] == value


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "value.pkl"
    path.write_bytes(pickle.dumps(b"a" * 5000, protocol=4))
    span = read_pickle(path)
    assert isinstance(span, Span)
    path.write_bytes(pickle.dumps(b"b" * 5000, protocol=4))
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        span.read()


def test_every_truncation_is_refused() -> None:
    data = pickle.dumps({"a": [1.5, "text", (b"x" * 300, {2})]}, protocol=4)
    for length in range(len(data)):
        with pytest.raises(CheckpointError, match=r"truncated|the file is empty"):
            read_pickle(data[:length], "a.pkl")
    with pytest.raises(CheckpointError, match="3 bytes follow the end"):
        read_pickle(data + b"abc")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\x80\x06.", "protocol 6"),
        (b".", "empty stack"),
        (b"NN.", "1 values are left over"),
        (b"t.", "ends a group"),
        (b"(0t.", "ends a group"),
        (b"(a.", "empty stack"),
        (b"N(a.", "empty stack"),  # may not reach below the mark
        (b"N)b.", "nothing is given a state"),
        (b"}]b.", "a mapping is given 'list' as its state"),
        (b"NNs.", "empty stack"),
        (b"NNNs.", "are put into nothing"),
        (b"}(Nu.", "are put into a mapping"),
        (b"NNa.", "appended to nothing"),
        (b"(\x8f(.", "empty stack"),
        (b"h\x05.", "value 5 is used before"),
        (b"gx\n.", "not written in digits"),
        (b"Iabc\n.", "not written in digits"),
        (b"I" + b"9" * 3000 + b"\n.", "not written in digits"),
        (b"I9", "a line of text"),
        (b"Fx\n.", "not written as one"),
        (b"Sx\n.", "quoted text"),
        (b"S'a\\x41'\n.", "a quoted text that is not plain"),
        (b"c_codecs\nencode\n(X\x02\x00\x00\x00\xc4\x80X\x06\x00\x00\x00latin1tR.", "latin1"),
        (b"X\x01\x00\x00\x00\xff.", "not utf-8"),
        (b"U\x01\xff.", "not ascii"),
        (b"V\\u12\n.", "not raw-unicode-escape"),
        (b"\x8b\xff\xff\xff\x00.", "a number of 16777215 bytes"),
        (b"}}Ns.", "expected text or a number as key, found a mapping"),
        (b"\x8f()\x90.", "expected text or a number as key, found 'tuple'"),
        (b"NQ.", "stored elsewhere"),
        (b"Pid\n.", "stored elsewhere"),
        (b"\x95\xff\xff\xff\xff\xff\xff\xff\xff.", "truncated"),
        (b"ccollections\nOrderedDict\n)}(X\x01\x00\x00\x00aNu\x92.", "keyword arguments"),
        (b"ccollections\nOrderedDict\nNR.", "called with nothing"),
        (b"ccollections\nOrderedDict\n(NtR.", "list of pairs"),
        (b"ccollections\nOrderedDict\n(]NatR.", "list of pairs"),
        (b"cnumpy\nndarray\n)R.", "numpy.ndarray is called"),
        (b"cnumpy._core.multiarray\nscalar\n(NNNtR.", "a number without type and bytes"),
        (b"cnumpy._core.multiarray\n_reconstruct\n)R.", "a class other than numpy.ndarray"),
        (b"cnumpy._core.multiarray\n_reconstruct\n(NtR.", "a class other than numpy.ndarray"),
        (b"cnumpy\ndtype\n)R.", "an array of type"),
        (b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8tR.", "an array of type"),
        (b"NNR.", "nothing is called"),
    ],
)
def test_malformed_pickles_say_why(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_pickle(data)


# ------------------------------------------------------------------------- time and memory


def number(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


def laughs(levels: int) -> bytes:
    """A list of two references to a list of two references, and so on: 2^levels values."""
    return b"(]q\x00" + b"](h\x00h\x00eq\x00" * levels + b"1h\x00."


def deep(levels: int) -> bytes:
    return b"N" + b"\x85" * levels + b"."


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "references": (lambda: laughs(60), f"{MAX_NODES} values"),
    "references in tuples": (lambda: b")" + b"q\x00h\x00\x86" * 60 + b".", f"{MAX_NODES} values"),
    "nesting": (lambda: deep(MAX_DEPTH + 1), f"{MAX_DEPTH} levels"),
    "deep nesting": (lambda: deep(20_000), f"{MAX_DEPTH} levels"),
    "marks": (lambda: b"(" * 1_000_000, "groups are open"),
    "a cycle": (lambda: b"]q\x00h\x00a.", "contains itself"),
    "a cycle of two": (lambda: b"}q\x00X\x01\x00\x00\x00a(h\x00ts.", "contains itself"),
    "empty sets": (lambda: b"(" + b"\x8f" * 30_000 + b"t.", "more objects than"),
    "duplicates": (lambda: b"(N" + b"2" * 2_500_000 + b"t.", "more objects than"),
    "memo": (lambda: b"N" + b"\x94" * 100_000 + b".", "more objects than"),
    "memo of far numbers": (
        lambda: b"N" + b"".join(b"r" + number(2**31 + i, 4) for i in range(60_000)) + b".",
        "more objects than",
    ),
    "endless instructions": (lambda: b"N0" * 150_000 + b"N.", "more objects than"),
    "numbers as keys": (
        lambda: (
            b"}(" + b"".join(b"J" + number(i, 4) + b"N" for i in range(MAX_NUMBER_KEYS + 1)) + b"u."
        ),
        "too many to look up",
    ),
    "a long text": (lambda: b"X" + number(2**31, 4) + b"abc.", "truncated"),
    "a text of 8 bytes length": (lambda: b"\x8d" + number(2**63, 8) + b"abc.", "truncated"),
    "long bytes": (lambda: b"\x8e" + number(2**62, 8) + b"abc.", "truncated"),
    "a long text that is there": (
        lambda: b"X" + number(2**23, 4) + b"a" * 2**23 + b".",
        "8388608 bytes",
    ),
    "wide text": (
        lambda: b"(" + (b"X" + number(2**20, 4) + b"a" * (2**20 - 4) + "😀".encode()) * 20 + b"t.",
        "more objects than",
    ),
    "text lines": (lambda: b"(" + b"I1\n" * 250_000 + b"t.", "more objects than"),
}


# Nothing but the largest budget stops these: an eighth of it takes an eighth of the seconds.
ENDLESS = {"memo of far numbers", "endless instructions", "text lines"}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_in_time_and_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, message = BOMBS[name]
    data = make()
    if name in ENDLESS:
        monkeypatch.setattr(values, "MAX_BUDGET", values.MAX_BUDGET // 8)
    began = time.process_time()
    with pytest.raises(CheckpointError, match=message):
        read_pickle(data)
    assert time.process_time() - began < 20  # a fraction of it, unless the machine is busy


@pytest.mark.parametrize("code", [b"\x8f", b"}", b"]", b")\x94", b"N\x94", b"K\x07"])
def test_memory_stays_within_the_budget(code: bytes) -> None:
    # The budget estimates; what Python really allocates must not be far above.
    data = b"(" + code * 40_000
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read_pickle(data)
        assert tracemalloc.get_traced_memory()[1] < 1.2 * (4 * 2**20 + 64 * len(data)) + len(data)
    finally:
        tracemalloc.stop()


def hash_collisions(count: int) -> list[int]:
    return [i * (2**61 - 1) for i in range(1, count + 1)]


@pytest.mark.parametrize("make", [dict.fromkeys, set])
def test_keys_with_equal_hashes_cost_little(make: Callable[[list[int]], Any]) -> None:
    data = pickle.dumps(make(hash_collisions(2000)), protocol=4)
    began = time.process_time()
    assert len(read_pickle(data)) == 2000  # type: ignore[arg-type]
    assert time.process_time() - began < 5
    more = b"".join(
        b"\x8a\x0a" + number(n, 10) + b"N" for n in hash_collisions(MAX_NUMBER_KEYS + 1)
    )
    with pytest.raises(CheckpointError, match="too many to look up"):
        read_pickle(b"}(" + more + b"u.")


def test_quoted_text_is_plain() -> None:
    assert read_pickle(b"S'plain'\n.") == "plain"
