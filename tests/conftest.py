"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of reference numbers from the official implementations."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Tests run in several processes: more threads than cores would only make them wait.
    torch.set_num_threads(1)
