"""Unfinished work beside an output."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from merge_rl.errors import RunError
from merge_rl.storage.files.atomic import WorkFolder

KEY = {"seed": 3, "extractor": "digits", "limit": None}


def test_work_is_found_again_under_the_same_key(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "a.safetensors", KEY)
    assert not list(tmp_path.iterdir())  # nothing done, nothing left behind
    work.write("state", {"x": torch.arange(3)}, {"done": 7, "names": ["a"]})
    assert [path.name for path in tmp_path.iterdir()] == [".a.safetensors.partial"]
    found = WorkFolder(tmp_path / "a.safetensors", dict(KEY)).read("state")
    assert found is not None
    assert found[0]["x"].tolist() == [0, 1, 2]
    assert found[1] == {"done": 7, "names": ["a"]}
    assert work.read("other") is None
    work.remove()
    assert not list(tmp_path.iterdir())
    work.remove()


def test_work_under_another_key_is_dropped(tmp_path: Path) -> None:
    WorkFolder(tmp_path / "a", KEY).write("state", {"x": torch.ones(1)}, {})
    other = WorkFolder(tmp_path / "a", {**KEY, "seed": 4})
    assert other.read("state") is None
    assert not list(tmp_path.iterdir())


def test_damage_is_as_good_as_nothing(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "a", KEY)
    work.write("state", {"x": torch.ones(1)}, {})
    file = work.path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-2])
    assert work.read("state") is None
    (work.path / "key.json").write_text("{")
    assert WorkFolder(tmp_path / "a", KEY).read("state") is None


def test_what_others_put_there_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / ".a.partial"
    folder.mkdir()
    (folder / "mine.txt").write_text("!")
    with pytest.raises(RunError, match=r"\.a\.partial is in the way; expected the unfinished work"):
        WorkFolder(tmp_path / "a", KEY)
    assert (folder / "mine.txt").read_text() == "!"
