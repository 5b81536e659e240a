"""What runs on a GPU: skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from merge_rl.demo import write_demo


@pytest.fixture(scope="session", autouse=True)
def gpu() -> torch.device:
    """The first GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the embedded runs, `edm2` and `sit`: to read only."""
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder)
    return folder
