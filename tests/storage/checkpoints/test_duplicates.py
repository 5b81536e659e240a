"""One file under two names, and copies, count once in a set."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from merge_rl.storage.checkpoints import base_index, open_checkpoints, save_checkpoint
from merge_rl.storage.files import save_tensors
from merge_rl.workflows.export import merge

STEPS = (500, 750, 2000)
SIZE = 3 * 2**20 + 5  # larger than what is compared at a time, and than all samples


@functools.cache
def drawn() -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(0))


def weights(step: int) -> dict[str, Tensor]:
    """Every value is another than at another step."""
    return {"w": drawn().roll(step), "b": torch.tensor([float(step)]).half()}


def rewrite(source: Path, target: Path) -> None:
    """Another file with the same tensors: in another order, with other metadata."""
    state = weights(int(source.stem.rpartition("_")[2]))
    save_checkpoint(target, dict(reversed(state.items())), {"made": "again"})


Way = Callable[[Path, Path], object]
WAYS: list[Way] = [
    lambda source, target: target.symlink_to(source.name),
    lambda source, target: target.symlink_to(source.absolute()),
    os.link,
    shutil.copyfile,
    rewrite,
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in STEPS:
        save_tensors(tmp_path / f"step_{step}.safetensors", weights(step))
    return tmp_path


@pytest.mark.parametrize("way", WAYS, ids=["link", "absolute", "hard", "copy", "rewritten"])
@pytest.mark.parametrize("name", ["last", "z_best"])
def test_one_file_counts_once(folder: Path, way: Way, name: str) -> None:
    way(folder / "step_2000.safetensors", folder / f"{name}.safetensors")
    opened = open_checkpoints(folder)
    assert opened.names == ("step_500", "step_750", "step_2000")
    assert opened.duplicates == {name: "step_2000"}
    (note,) = opened.notes
    same = f"{name} and step_2000 are the same weights and count once, as step_2000"
    assert note == f"{folder}: {same}"
    thirds = merge(opened, [1 / 3] * 3)
    # (500 + 750 + 2000) / 3, where a second 2000 would have made it 1312.5.
    assert float(thirds["b"]) == pytest.approx(1083.3333, abs=1e-3)
    # The name still means the checkpoint.
    assert base_index(opened, name) == opened.newest == 2
    assert open_checkpoints(folder, select=[name]).names == (name,)
    every = open_checkpoints(folder, distinct=False)
    assert len(every) == 4
    assert every.duplicates == opened.duplicates


@pytest.mark.parametrize("place", [0, 1, SIZE // 2, SIZE - 1])
def test_one_other_value_is_another_checkpoint(folder: Path, place: int) -> None:
    state = weights(2000)
    state["w"][place] += 1
    save_tensors(folder / "last.safetensors", state)
    opened = open_checkpoints(folder)
    assert opened.names == ("step_500", "step_750", "step_2000", "last")
    assert opened.duplicates == {}
    assert opened.notes == []


def test_a_name_that_tells_its_progress_stays(tmp_path: Path) -> None:
    for name in ("a-best2", "net-0008388", "zlast"):
        save_tensors(tmp_path / f"{name}.safetensors", weights(1))
    opened = open_checkpoints(tmp_path)
    assert opened.names == ("net-0008388",)
    assert opened.duplicates == {"a-best2": "net-0008388", "zlast": "net-0008388"}
