"""The machine that reads pickles, at its bounds: what is paid for, how deep, how many, how long."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from merge_rl.errors import CheckpointError
from merge_rl.storage.pickles import machine as machines
from merge_rl.storage.pickles import opcodes
from merge_rl.storage.pickles.machine import Record, Unbuilt, require_tree
from merge_rl.storage.pickles.reading import read_pickle
from merge_rl.storage.pickles.values import Budget, Global, is_one_of, kind_of, shown, whole_numbers
from tests.storage.pickles.test_pickle_names import ARRAY, dtype_of, machine, made

# 32 for an instruction; 250 for a container, 72 for a tuple, 110 for a key, 10 for a member of a
# list, 8 for each value since a mark, 120 for the memo, 64 and 4 a byte for text, 200 for a name or
# a stretch of the file, 400 for a call.
COSTS: dict[bytes, int] = {
    b"N.": 32,
    b"NN\x86.": 3 * 32 + 72,
    b"(NNt.": 4 * 32 + 2 * 8 + 72,
    b"].": 32 + 250,
    b"(NNl.": 4 * 32 + 2 * 8 + 250,
    b"]Na.": 3 * 32 + 250 + 10,
    b"](NNe.": 5 * 32 + 250 + 2 * 8 + 2 * 10,
    b"}.": 32 + 250,
    b"}NNs.": 4 * 32 + 250 + 110,
    b"}(NNK\x01Nu.": 7 * 32 + 250 + 4 * 8 + 2 * 110,
    b"(NNd.": 4 * 32 + 2 * 8 + 250 + 110,
    b"\x8f.": 32 + 250,
    b"\x8f(NK\x01\x90.": 5 * 32 + 250 + 2 * 8 + 2 * 110,
    b"(NK\x01\x91.": 4 * 32 + 2 * 8 + 250 + 2 * 110,
    b"N\x94.": 2 * 32 + 120,
    b"U\x03abc.": 32 + 64 + 3 * 4,
    b"I12\n.": 32 + 2,  # its digits
    b"I-12\n.": 32 + 2,
    b"I01\n.": 32,
    b"\x8a\x02\x01\x01.": 32 + 2,  # its bytes
    b"C\x01a.": 32 + 300,  # bytes in memory
    b"B\x01\0\0\0a.": 32 + 200,  # bytes that stay in the file
    b"ctyping\nAny\n.": 32 + 64 + 6 * 4 + 64 + 3 * 4 + 200,
    b"ctorch\nSize\n)\x85R.": 4 * 32 + 64 + 5 * 4 + 64 + 4 * 4 + 200 + 72 + 400,
    b"NQ.": 2 * 32 + 200,
}


@pytest.mark.parametrize("data", COSTS)
def test_what_is_made_is_paid_for(data: bytes) -> None:
    reader = machine(data, persistent=lambda pid, _: pid)
    reader.budget.left = COSTS[data]
    opcodes.run(reader)
    assert reader.budget.left == 0
    short = machine(data, persistent=lambda pid, _: pid)
    short.budget.left = COSTS[data] - 1
    with pytest.raises(CheckpointError, match="a.pkl: asks for more objects than a checkpoint"):
        opcodes.run(short)


def test_budgets_follow_from_the_size_of_the_file_up_to_a_most() -> None:
    assert Budget("a", 10).left == 4 * 2**20 + 640
    assert Budget("a", 2**30).left == 64 * 2**20
    budget = Budget("a", 1)
    budget.number_keys = 3
    budget.require_keys(["a", Record("b"), True, 1, 2.5])  # of which three are numbers
    with pytest.raises(CheckpointError, match="keys are numbers, too many"):
        budget.require_keys([3])
    for key, kind in ((b"a", "'bytes'"), ((1,), "'tuple'"), (frozenset(), "'frozenset'")):
        with pytest.raises(
            CheckpointError, match=f"expected text or a number as key, found {kind}"
        ):
            Budget("a", 1).require_keys([key])


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"\x8a\x01\xff.", -1),
        (b"\x8b\x80\0\0\0" + bytes(127) + b"\x01.", 2**1016),  # 128 bytes
        (b"I" + b"7" * 256 + b"\n.", int("7" * 256)),
        (b"I-5\n.", -5),
        (b"L5L\n.", 5),
        (b"I00\n.", False),
        (b"I01\n.", True),
        (b"S''\n.", ""),
        (b'S"a"\n.', "a"),
        (b"Np000000000001\ng1\n\x86.", (None, None)),  # a key of twelve digits
        (b"}Nb.", {}),
        (b"}}b.", {}),
        (b"ctorch\nSize\n)\x85}\x92.", ()),
        (b"N(1.", None),
        (b"N(NN1.", None),
        (b"NK\x050N\x86.", (None, None)),
        (b"K\x01K\x022\x87.", (1, 2, 2)),
        (pickle.dumps("\ud800", 4), "\ud800"),  # half of a character, which Python can write
    ],
)
def test_what_is_read(data: bytes, value: object) -> None:
    found = read_pickle(data)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"\x8b\x81\0\0\0" + bytes(128) + b"\x01.", "a number of 129 bytes, at most 128 are read"),
        (b"I" + b"7" * 257 + b"\n.", "a number that is not written in digits"),
        (b"I--5\n.", "a number that is not written in digits"),
        (b"Np0000000000001\n.", "a number of a value that is not written in digits"),
        (b"S'\n.", "a quoted text that is not plain"),
        (b"S'a\"\n.", "a quoted text that is not plain"),
        (b"Saa\n.", "a quoted text that is not plain"),
        (b"](N\x90.", "members are added to 'list'"),
        (b"\x8f(]\x90.", "expected text or a number as key, found 'list'"),
        (b"(icollections\nOrderedDict\n.", "an old-style instance"),
        (b"(ios\nsystem\n.", "refers to 'os.system'"),
        (b"NN\x93.", "a name is given as nothing and nothing"),
        (b"U\x01aN\x93.", "a name is given as text and nothing"),
        (b"NU\x01a\x93.", "a name is given as nothing and text"),
        (b"N)R.", "nothing is called with 'tuple'"),
        (b"ctorch\nSize\n)\x85N\x92.", "made with keyword arguments"),
        (b"ctorch\nSize\nNb.", "the name torch.Size is given a state"),
        (b"N((t0\x85.", "takes a value from an empty stack"),  # below the mark that is still open
        (b"N(2.", "looks at the top of an empty stack"),
        (b"N(\x94.", "looks at the top of an empty stack"),
    ],
)
def test_what_is_refused(data: bytes, told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        read_pickle(data)


def test_groups_and_texts_up_to_their_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "MAX_MARKS", 2)
    monkeypatch.setattr(opcodes, "MAX_TEXT_BYTES", 3)
    assert read_pickle(b"((U\x03abctt.") == (("abc",),)
    with pytest.raises(CheckpointError, match="more than 2 groups are open at once"):
        read_pickle(b"(((ttt.")
    with pytest.raises(CheckpointError, match="a text of 4 bytes, at most 3 are read"):
        read_pickle(b"U\x04abcd.")


def test_trees_up_to_their_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "MAX_NODES", 5)
    monkeypatch.setattr(machines, "MAX_DEPTH", 2)
    trees: list[object] = [1, [1, 2, 3, 4], [[1], [2]], [[]], {"a": (1, 2)}, Record("a", (), 1)]
    for tree in trees:
        require_tree(tree, "a")
    shared = [1, 2]
    more: list[object] = [[1, 2, 3, 4, 5], [[[]]], {"a": {"b": [1]}}, [shared, shared]]
    for tree in more:
        with pytest.raises(CheckpointError, match="a: nested beyond 2 levels or 5 values"):
            require_tree(tree, "a")


def test_what_is_built_takes_its_place_where_it_is_still_remembered() -> None:
    reader = machine()
    state = (1, (2,), dtype_of("u1"), False, b"ab")
    reader.push(made("numpy.core.multiarray._reconstruct", ARRAY))
    for key in (0, 7):
        reader.put(key)
    reader.push(None)
    reader.put(7)  # another value by the same number
    reader.pop()
    reader.push(state)
    reader.build()
    reader.get(7)
    assert reader.pop() is None
    reader.get(0)
    built: Any = reader.pop()
    assert reader.pop() is built
    np.testing.assert_array_equal(built, np.frombuffer(b"ab", np.uint8))
    with pytest.raises(NotImplementedError):
        Unbuilt().build(None, reader)


def test_words_for_values() -> None:
    values: list[object] = [None, "a", 1, {}, Global("a.b"), 1.5, []]
    told = ["nothing", "text", "a whole number", "a mapping", "the name a.b", "'float'", "'list'"]
    assert [kind_of(value) for value in values] == told
    assert (shown("a" * 80), shown("a" * 81)) == ("a" * 80, "a" * 77 + "...")
    assert shown("a\x1bb") == "a?b"
    assert is_one_of("a", "a", "b")
    assert not is_one_of("c", "a", "b")
    assert not is_one_of(np.array(["a", "b"]), "a")


@pytest.mark.parametrize("value", [(), (0, 3), (2**48,), (1,) * 32, (0, 2**48)])
def test_shapes(value: tuple[int, ...]) -> None:
    assert whole_numbers(value) == value


@pytest.mark.parametrize(
    "value", [None, [1], (-1,), (True,), (1.0,), (2**48 + 1,), (0, 2**48 + 1), (1,) * 33, (2, "a")]
)
def test_no_shapes(value: object) -> None:
    assert whole_numbers(value) is None
