"""Feature sets and the official implementations' values of their distances."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def official(golden: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((golden / "metrics/expected.json").read_text())
    return values


@pytest.fixture(scope="session")
def features(golden: Path) -> dict[str, Tensor]:
    """a (600, 64), b (500, 64), c (40, 64), d (600, 64), float32: to read only."""
    files = {name: golden / f"metrics/features_{name}.npz" for name in "abcd"}
    return {name: torch.from_numpy(np.load(file)["features"]) for name, file in files.items()}
