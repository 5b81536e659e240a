"""What is converted: which files of a folder, in which order."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from merge_rl.errors import CheckpointError
from merge_rl.storage.convert.inputs import list_files


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_files_of_a_folder_come_in_natural_order(tmp_path: Path, ending: str) -> None:
    names = [f"step_{step}{ending}" for step in (20000, 500, 2000, 750)]
    for name in names:
        (tmp_path / name).touch()
    expected = [f"step_{step}{ending}" for step in (500, 750, 2000, 20000)]
    assert [path.name for path in list_files(tmp_path)[0]] == expected


@pytest.mark.parametrize("link", ["last.pt", "zlast.pt"])
def test_a_link_to_a_file_beside_it_is_no_file_of_its_own(tmp_path: Path, link: str) -> None:
    for step in (500, 2000):
        (tmp_path / f"step_{step}.pt").touch()
    (tmp_path / link).symlink_to("step_2000.pt")
    files, repeated = list_files(tmp_path)
    assert {path.name for path in files} == {"step_500.pt", "step_2000.pt"}
    kept = tmp_path / "step_2000.pt"
    assert repeated == [
        f"{tmp_path / link} and {kept} are the same file and count once, as step_2000.pt"
    ]
    assert list_files(tmp_path / link) == ([tmp_path / link], [])
    assert list_files([kept, tmp_path / link, kept]) == ([kept], repeated)


def test_what_is_no_file_is_called_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pt")
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    for name, found in (("a.pt", "expected a file, found a pipe"), ("loop.pt", "no such file or")):
        with pytest.raises(CheckpointError, match=f"{name}: {found}"):
            list_files(tmp_path / name)
    with pytest.raises(CheckpointError, match="null: expected a file, found a device"):
        list_files("/dev/null")


def test_a_set_is_not_converted_again(tiny: Path) -> None:
    with pytest.raises(CheckpointError, match="already, nothing to convert"):
        list_files(tiny)
