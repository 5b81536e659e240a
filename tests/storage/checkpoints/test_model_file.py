"""One network from disk: exported folders, files of a set, and where the config comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from merge_rl.errors import CheckpointError
from merge_rl.storage.checkpoints.manifest import (
    MANIFEST_NAME,
    CheckpointEntry,
    Manifest,
    write_manifest,
)
from merge_rl.storage.checkpoints.model_file import open_model_file, save_checkpoint
from merge_rl.storage.files.atomic import write_json

CONFIG = {"model": "edm2", "img_resolution": 8}


def weights(seed: int = 0) -> dict[str, Tensor]:
    return {"gain": torch.tensor(0.5 + seed), "steps": torch.tensor([seed])}


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A set of one file in a folder of its own, with a manifest above."""
    save_checkpoint(tmp_path / "raw/a.safetensors", weights(1))
    entries = (CheckpointEntry(file="raw/a.safetensors"),)
    write_manifest(tmp_path / MANIFEST_NAME, Manifest(model=CONFIG, checkpoints=entries))
    return tmp_path


def test_an_exported_model_folder(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model.safetensors", weights(3), {"recipe": [0.5, 0.5]})
    write_json(tmp_path / "config.json", CONFIG)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        model = open_model_file(path)
        assert model.config == CONFIG
        assert model.metadata == {"recipe": "[0.5, 0.5]"}
        torch.testing.assert_close(model.weights["gain"], weights(3)["gain"])


def test_a_file_of_a_set_takes_the_config_of_its_manifest(listed: Path) -> None:
    read, config, metadata = open_model_file(listed / "raw/a.safetensors")
    assert (read["steps"].item(), config, metadata) == (1, CONFIG, {})
    save_checkpoint(listed / "ema/c.safetensors", weights())
    assert open_model_file(listed / "ema/c.safetensors").config is None


def test_the_config_in_the_file_comes_first(listed: Path) -> None:
    own = {"model": "sit", "depth": 2}
    save_checkpoint(listed / "ema/c.safetensors", weights(), {"config": own})
    write_json(listed / "ema/config.json", CONFIG)
    assert open_model_file(listed / "ema/c.safetensors").config == own


def test_a_catalogue_in_a_parent_folder_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text("version: 1\nsets: []\n")
    save_checkpoint(tmp_path / "out/model.safetensors", weights())
    assert open_model_file(tmp_path / "out").config is None


def test_what_is_not_one_network_is_refused(tmp_path: Path) -> None:
    for name in "abc":
        save_checkpoint(tmp_path / f"{name}.safetensors", weights())
    with pytest.raises(CheckpointError, match=r"expected the folder of one model, found 3 \.safe"):
        open_model_file(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_model_file(tmp_path / "nothing.safetensors")
    (tmp_path / "a.pkl").write_bytes(b"")
    with pytest.raises(CheckpointError, match="found a .[a-z]+ file; `mergerl convert`"):
        open_model_file(tmp_path / "a.pkl")
    (tmp_path / "a.zip").write_bytes(b"")  # no weights, as far as anyone knows
    with pytest.raises(CheckpointError, match="a.zip: expected a .safetensors file, found a .zip"):
        open_model_file(tmp_path / "a.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"found no \.safetensors file$"):
        open_model_file(tmp_path / "empty")
