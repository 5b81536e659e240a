"""A merge in one pass: values by hand, blocks and threads, and what is refused."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from merge_rl.core.merging.groups import Groups
from merge_rl.core.merging.stored_numbers import Raw
from merge_rl.errors import ConfigError, NonFiniteWeightsError
from merge_rl.storage.checkpoints import one_pass
from merge_rl.storage.checkpoints.checkpoint_set import CheckpointSet, open_checkpoints
from merge_rl.storage.checkpoints.merging import merge_into_memory
from merge_rl.storage.checkpoints.plan import MergePlan, plan_merge
from merge_rl.storage.files import save_tensors


def opened(folder: Path) -> CheckpointSet:
    """Two checkpoints of floats in two groups, halves that are carried, and whole numbers."""
    for k in (1, 2):
        tensors = {
            "a": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]) * k,
            "b": torch.tensor([10.0, 20.0]) * k,
            "h": torch.tensor([0.5, 1.5]).half() * k,
            "n": torch.tensor([7, 8, 9]) * k,
        }
        save_tensors(folder / f"s_{k}.safetensors", tensors)
    return open_checkpoints(folder)


PLAN = MergePlan(merged=("a", "b"), carried=("h", "n"), groups=Groups(("x", "y"), (0, 1)), base=1)
# Of each merge a row a group, of each group the coefficients of the two files.
TABLE = np.array([[[1, 0], [0.5, 0.5]], [[1, 1], [0, 0]], [[2, -1], [0, 3]], [[0, 1], [1, 1]]])


@pytest.mark.parametrize("hashed", [False, True])
def test_many_merges_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: bool) -> None:
    monkeypatch.setattr(one_pass, "PART", 2)  # so that tensors are cut
    monkeypatch.setattr(one_pass, "BLOCK_BYTES", 64)
    checkpoints = opened(tmp_path)
    found = {name: np.zeros((4, *info.shape)) for name, info in checkpoints.tensors.items()}
    seen = {name: np.zeros((4, *info.shape)) for name, info in checkpoints.tensors.items()}

    def put(p: int, name: str, start: int, values: Raw) -> None:
        found[name][p][start : start + values.size] = values
        seen[name][p][start : start + values.size] += 1

    one_pass.merge_pass(checkpoints, PLAN, TABLE, put, hashed=hashed)
    assert all((times == 1).all() for times in seen.values())
    # The second file is twice the first: 1, 1 + 2, 2 - 2 and 2 times the first; 1.5, 0, 6 and 3.
    for p, factor in enumerate([1.0, 3.0, 0.0, 2.0]):
        np.testing.assert_array_equal(found["a"][p], np.array([1, 2, 3, 4, 5]) * factor)
    for p, factor in enumerate([1.5, 0.0, 6.0, 3.0]):
        np.testing.assert_array_equal(found["b"][p], np.array([10, 20]) * factor)
    for p in range(4):  # carried from the base
        np.testing.assert_array_equal(found["h"][p], [1.0, 3.0])
        np.testing.assert_array_equal(found["n"][p], [14, 16, 18])
    known = [checkpoints.hashes.known(k) is not None for k in range(2)]
    assert known == [hashed, hashed]


def test_a_merge_in_memory_is_in_the_types_and_order_of_the_set(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path)
    found = merge_into_memory(checkpoints, PLAN, TABLE[:1])
    assert list(found) == list(checkpoints.tensors)
    assert {name: tensors[0].dtype for name, tensors in found.items()} == {
        "a": torch.float32, "b": torch.float32, "h": torch.float32, "n": torch.int64,
    }  # fmt: skip
    assert found["b"][0].tolist() == [15.0, 30.0]
    assert found["n"][0].tolist() == [14, 16, 18]


def test_files_that_count_for_nothing_are_not_read(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path)
    plan = MergePlan(
        merged=("a", "b", "h", "n"), carried=(), groups=Groups(("x",), (0,) * 4), base=0
    )
    (tmp_path / "s_2.safetensors").unlink()
    found = merge_into_memory(checkpoints, plan, [[[3.0, 0.0]]])
    assert found["a"][0].tolist() == [3.0, 6.0, 9.0, 12.0, 15.0]


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ([[1.0, 0.0]], r"expected coefficients \(2, 2\), got \(2,\)"),
        ([[[1.0, 0.0]]], r"expected coefficients \(2, 2\), got \(1, 2\)"),
        ([[[[1.0, 0.0]] * 2]], r"expected coefficients \(2, 2\), got \(1, 2, 2\)"),
        ([[[1.0, 0.0], [np.nan, 0.0]]], "expected finite coefficients, got NaN or infinity"),
        ([[[1.0, 0.0], [1e300, 0.0]]], "expected finite coefficients"),  # in float32
    ],
)
def test_coefficients_that_do_not_fit(table: object, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        merge_into_memory(opened(tmp_path), PLAN, table)  # type: ignore[arg-type]


def test_merges_that_overflow_are_refused_and_sums_that_do_not(tmp_path: Path) -> None:
    save_tensors(tmp_path / "s_1.safetensors", {"w": torch.tensor([3e38, 3e38])})
    save_tensors(tmp_path / "s_2.safetensors", {"w": torch.tensor([1.0, 2.0])})
    checkpoints = open_checkpoints(tmp_path)
    plan = plan_merge(checkpoints)
    found = merge_into_memory(checkpoints, plan, [[[1.0, 0.0]]])  # whose sum is infinite
    assert found["w"][0].tolist() == torch.tensor([3e38, 3e38]).tolist()
    with pytest.raises(NonFiniteWeightsError, match="tensor 'w' of the merge overflows float32"):
        merge_into_memory(checkpoints, plan, [[[2.0, 0.0]]])


def test_blocks_hold_as_much_as_they_may(tmp_path: Path) -> None:
    checkpoints = opened(tmp_path)
    blocks = list(one_pass._blocks(checkpoints, ["a", "b", "n"], 80, 3))
    parts = [[(s.name, s.start, s.count, s.offset, s.code) for s in block] for block in blocks]
    # Each part begins at a multiple of 64 bytes; 64 + 8 of 80 bytes, but not 64 + 24.
    assert parts == [
        [("a", 0, 3, 0, "F32"), ("a", 3, 2, 64, "F32")],
        [("b", 0, 2, 0, "F32")],
        [("n", 0, 3, 0, "I64")],
    ]
    (whole,) = one_pass._blocks(checkpoints, ["b", "n"], 64 + 24, 5)
    assert [(s.offset, s.nbytes) for s in whole] == [(0, 8), (64, 24)]
    row = np.arange(88, dtype=np.uint8)
    assert whole[1].within(row).tobytes() == row[64:88].tobytes()
    assert list(one_pass._blocks(checkpoints, [], 80, 3)) == []


def test_threads_are_as_many_as_torch_or_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert one_pass.threads() == torch.get_num_threads()
    monkeypatch.delitem(sys.modules, "torch")
    for said, expected in (("3", 3), ("0", None), ("x", None), ("", None)):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert one_pass.threads() == (expected or len(os.sched_getaffinity(0)))
    monkeypatch.delattr(os, "sched_getaffinity")
    for count, expected in ((5, 5), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert one_pass.threads() == expected
