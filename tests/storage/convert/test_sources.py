"""What is converted: which files of a folder, in which order."""

from __future__ import annotations

from pathlib import Path

import pytest

from merge_rl.storage.convert.sources import list_files


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_files_of_a_folder_come_in_natural_order(tmp_path: Path, ending: str) -> None:
    names = [f"step_{step}{ending}" for step in (20000, 500, 2000, 750)]
    for name in names:
        (tmp_path / name).touch()
    expected = [f"step_{step}{ending}" for step in (500, 750, 2000, 20000)]
    assert [path.name for path in list_files(tmp_path)] == expected
