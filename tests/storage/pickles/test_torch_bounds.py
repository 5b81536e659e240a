"""Tensors and storages of torch files at their bounds: what fits exactly, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from merge_rl.errors import CheckpointError
from merge_rl.storage.pickles.reading import read_data
from merge_rl.storage.pickles.spans import ByteSource, Span
from merge_rl.storage.pickles.tensors import (
    StorageRef,
    TensorRef,
    load_from_bytes,
    rebuild_parameter,
    rebuild_tensor,
    row_major,
    storage_of,
)
from merge_rl.storage.pickles.values import Global
from tests.storage.pickles.test_pickle_names import machine
from tests.storage.pickles.test_torch_storage import inner_block, rezipped, saved

FLOATS = Global("torch.FloatStorage")


def tensor(
    count: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0
) -> TensorRef:
    data = torch.arange(float(count)).numpy().tobytes()
    storage = StorageRef("F32", count, Span(ByteSource(data, "a"), 0, len(data)))
    return TensorRef(storage, offset, shape, stride)


def test_strides_row_by_row() -> None:
    assert (row_major((2, 3, 4)), row_major((5,)), row_major(())) == ([12, 4, 1], [1], [])


@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        ((2, 3), (3, 1)),
        ((3, 2), (1, 3)),
        ((1, 6), (99, 1)),
        ((2, 2), (3, 2)),
        ((), ()),
        ((0,), (1,)),
    ],
)
def test_tensors_are_read_by_their_strides(shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    ref = tensor(8, shape, stride, offset=2)
    expected = torch.arange(8.0).as_strided(shape, stride, 2)
    assert torch.equal(ref.load(), expected)
    for size in (4, 5, 8, 100):  # bytes at a time
        pieces = list(ref.pieces(size))
        assert b"".join(pieces) == expected.contiguous().numpy().tobytes()
        assert all(len(piece) == size for piece in pieces[:-1])
    assert repr(ref) == f"<tensor float32 {list(shape)}>"


def test_tensors_may_be_spread_four_times_and_a_kibi() -> None:
    # Two elements: 4 * 2 + 1024 from the first to the last at most.
    assert tensor(1032, (2,), (1031,)).load().tolist() == [0.0, 1031.0]
    with pytest.raises(CheckpointError, match=r"shape \[2\] is spread over 1033 elements"):
        tensor(1033, (2,), (1032,)).load()
    with pytest.raises(CheckpointError, match="a tensor's content is not in its file"):
        TensorRef(StorageRef("F32", 2), 0, (2,), (1,)).load()


@pytest.mark.parametrize(
    "args",
    [
        (6, 0, (2, 3), (3, 1)),
        (6, 4, (2,), (1,)),
        (6, 1, (3,), (2,)),
        (6, 6, (0,), (1,)),
        (0, 0, (5, 0), (1, 1)),  # of nothing, whatever its strides
        (1, 0, (), ()),
    ],
)
def test_tensors_that_fit(args: Any) -> None:
    count, offset, shape, stride = args
    reader = machine()
    before = reader.budget.left
    for more in ((), (False, None)):
        ref = rebuild_tensor((StorageRef("F32", count), offset, shape, stride, *more), reader)
        assert (ref.offset, ref.shape, ref.stride, ref.storage.count) == args[1:] + args[:1]
    assert before - reader.budget.left == 2 * 300


FIT = (StorageRef("F32", 6), 0, (2, 3), (3, 1))


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (FIT[:3], "without storage, offset, shape and strides"),
        ((None, *FIT[1:]), "without storage, offset, shape and strides"),
        ((FIT[0], True, *FIT[2:]), "without storage, offset, shape and strides"),
        ((*FIT[:2], None, FIT[3]), "not a few whole numbers each"),
        ((*FIT[:3], None), "not a few whole numbers each"),
        ((*FIT[:3], (1,)), "not a few whole numbers each"),
        ((FIT[0], -1, (1,), (1,)), r"shape \[1\] from element -1 of 6"),
        ((FIT[0], 1, *FIT[2:]), r"shape \[2, 3\] from element 1 of 6"),
        ((FIT[0], 0, (7,), (0,)), r"shape \[7\] from element 0 of 6"),  # more than there are
        ((FIT[0], 2, (3,), (2,)), r"shape \[3\] from element 2 of 6"),
        ((*FIT, False, None, {"neg": True}), "the negative of what is stored"),
    ],
)
def test_tensors_that_do_not_fit(args: Any, told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        rebuild_tensor(args, machine())


def test_parameters_are_their_tensors() -> None:
    ref = rebuild_tensor(FIT, machine())
    assert rebuild_parameter((ref, True), machine()) is ref
    for args in ((), (1,), (None, ref)):
        with pytest.raises(CheckpointError, match="a parameter without a tensor"):
            rebuild_parameter(args, machine())


@pytest.mark.parametrize(("count", "view"), [(6, ()), (0, ()), (6, (None,))])
def test_storages(count: int, view: tuple[None, ...]) -> None:
    pid = ("storage", FLOATS, "0", "cpu", count, *view)
    found, key = storage_of(pid, machine(), len(pid))
    assert (found.code, found.count, found.nbytes, found.span, key) == (
        "F32",
        count,
        4 * count,
        None,
        "0",
    )


@pytest.mark.parametrize(
    ("pid", "told"),
    [
        ("storage", "not the storage of a tensor"),
        (["storage", FLOATS, "0", "cpu", 6], "not the storage of a tensor"),
        (("storage", FLOATS, "0", "cpu"), "not the storage of a tensor"),
        (("module", FLOATS, "0", "cpu", 6), "not the storage of a tensor"),
        (("storage", "torch.FloatStorage", "0", "cpu", 6), "a storage of text that is not one of"),
        (("storage", Global("torch.Size"), "0", "cpu", 6), "of the name torch.Size that is not"),
        (("storage", FLOATS, 0, "cpu", 6), "not one of numbers"),
        (("storage", FLOATS, "0", "cpu", True), "not one of numbers"),
        (("storage", FLOATS, "0", "cpu", -1), "not one of numbers"),
    ],
)
def test_no_storages(pid: Any, told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        storage_of(pid, machine(), 5)
    with pytest.raises(CheckpointError, match="a storage that is a view of another one"):
        storage_of(("storage", FLOATS, "0", "cpu", 6, ("1", 0, 2)), machine(), 6)


def test_a_storage_is_described_in_one_way() -> None:
    base = torch.arange(10.0)
    older = saved([base, base[5:]], legacy=True)
    again = older.rindex(b"K\nNt")  # ten elements, the second time
    with pytest.raises(CheckpointError, match=r"storage \d+ is described in two ways"):
        read_data(older[:again] + b"K\x0b" + older[again + 2 :])

    def shorter(name: str, old: bytes) -> bytes:
        at = old.rindex(b"K\nt")
        return old[:at] + b"K\x09" + old[at + 2 :]

    changed = rezipped(
        saved([base, base[5:]]), lambda n, old: shorter(n, old) if "pkl" in n else old
    )
    with pytest.raises(CheckpointError, match="storage 0 is not of 36 bytes of F32"):
        read_data(changed)


def listed(change: Callable[[bytes], bytes]) -> bytes:
    """An older file whose list of storages is changed."""
    older = saved(torch.arange(4.0), legacy=True)
    at = older.rindex(b"\x80\x02]q")
    end = older.index(b"a.", at) + 2
    return older[:at] + change(older[at:end]) + older[end:]


def test_what_is_listed_is_what_is_used() -> None:
    found: Any = read_data(listed(lambda keys: keys))
    assert found.load().tolist() == [0.0, 1.0, 2.0, 3.0]
    for change, count in (
        (lambda _: b"N.", 0),
        (lambda _: b"].", 0),
        (lambda keys: keys[:-1] + b"X\x01\0\0\0xa.", 2),
        (lambda _: b"]X\x01\0\0\0xa.", 1),
    ):
        with pytest.raises(CheckpointError, match=f"1 storages are used, but {count} are listed"):
            read_data(listed(change))


def test_blocks_are_bytes_in_memory_or_in_the_file() -> None:
    block = inner_block(torch.arange(4.0))
    for content in (block, Span(ByteSource(b"-" + block), 1, len(block))):
        found: Any = load_from_bytes((content,), machine())
        assert (found.count, found.code) == (4, "F32")
        assert found.span.read() == torch.arange(4.0).numpy().tobytes()
    for args, told in (
        ((), "block is nothing, expected bytes"),
        ((block, block), "block is nothing, expected bytes"),
        (("a",), "block is text, expected bytes"),
    ):
        with pytest.raises(CheckpointError, match=told):
            load_from_bytes(args, machine())
