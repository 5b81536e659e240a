"""A merged model under the verbs of the Hub's libraries, and its recipe in mergekit's words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

import merge_rl as mrl
from merge_rl.errors import ConfigError
from merge_rl.storage.checkpoints import plan_merge
from merge_rl.storage.checkpoints.checkpoint_set import CheckpointSet
from merge_rl.workflows.export.folder import save_merge
from merge_rl.workflows.export.recipe import mergekit_document
from tests.hub_server import HubServer

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ROW = [0.5, -0.25, 0.75, 0.0]


@pytest.fixture
def raw(shared_tiny: Path) -> CheckpointSet:
    return mrl.open_checkpoints(shared_tiny, track="raw")


@pytest.fixture
def merged(raw: CheckpointSet, tmp_path: Path) -> Path:
    row = torch.tensor([ROW], dtype=torch.float64)
    return save_merge(tmp_path / "merged", raw, row, plan=plan_merge(raw), groups={})


def test_what_is_saved_is_what_was_loaded(merged: Path, tmp_path: Path) -> None:
    model = mrl.MergedModel.from_pretrained(merged)
    saved = model.save_pretrained(tmp_path / "saved")
    for name in ("model.safetensors", "merge.yaml", "mergekit.yaml", "README.md"):
        assert (saved / name).read_bytes() == (merged / name).read_bytes(), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (saved, merged)]
    assert configs[0] == configs[1]
    noise, labels = torch.randn(2, *model.network.sample_shape), torch.tensor([1, 2])
    expected = mrl.sample(mrl.load_model(merged), noise, labels, num_steps=2)
    assert torch.equal(model.sample(noise, labels, num_steps=2), expected)
    with pytest.raises(ConfigError, match="saved: exists already; pass overwrite=True"):
        model.save_pretrained(saved)
    assert model.save_pretrained(saved, overwrite=True) == saved


@torch.no_grad()
def test_weights_that_were_changed_have_no_recipe(merged: Path, tmp_path: Path) -> None:
    model = mrl.MergedModel.from_pretrained(merged)
    next(model.network.parameters()).add_(1)
    saved = model.save_pretrained(tmp_path / "saved")
    assert not (saved / "merge.yaml").exists()
    assert "weights were changed" in (saved / "README.md").read_text()
    again = mrl.MergedModel.from_pretrained(saved)
    assert again.recipe is None
    for mine, theirs in zip(model.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_pushed_it_comes_back_by_its_name(merged: Path, hub: HubServer) -> None:
    model = mrl.MergedModel.from_pretrained(merged)
    model.push_to_hub("user/merge")
    files = hub.repos["user/merge"].files
    assert {"model.safetensors", "merge.yaml", "mergekit.yaml"} <= files.keys()
    assert files["merge.yaml"] == (merged / "merge.yaml").read_bytes()
    again = mrl.MergedModel.from_pretrained("user/merge", revision="main")
    assert again.config == model.config
    state = again.network.state_dict()
    assert all(torch.equal(state[k], t) for k, t in model.network.state_dict().items())


def test_a_checkpoint_of_a_set_has_no_recipe(raw: CheckpointSet) -> None:
    model = mrl.MergedModel.from_pretrained(raw.paths[0])
    assert model.recipe is None
    assert model.dtype == "float16"


def test_linear_merges_are_told_in_mergekits_words(merged: Path) -> None:
    found = yaml.safe_load((merged / "mergekit.yaml").read_text())
    assert found["merge_method"] == "linear"
    assert found["parameters"] == {"normalize": False}
    assert [m["parameters"]["weight"] for m in found["models"]] == ROW[:3]
    assert all(not m["model"].endswith(".safetensors") for m in found["models"])
    with safe_open(merged / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize(
    "changes",
    [
        {"groups": {"encoder": "enc"}},
        {"frozen": ["enc"]},
        {"sources": [{"file": "a.safetensors", "coefficients": [0.5]}]},  # not summing to 1
        {"sources": [{"file": "a.safetensors", "coefficients": [1.0, 1.0]}]},
        {"sources": []},
    ],
)
def test_other_merges_are_not(changes: dict[str, Any]) -> None:
    recipe = {"sources": [{"file": "ckpt-1/model.safetensors", "coefficients": [1.0]}]}
    assert mergekit_document({**recipe, **changes}) is None
    nested = {"file": "checkpoint-1/unet/diffusion_pytorch_model.safetensors"}
    found = mergekit_document({"sources": [{**nested, "coefficients": [1.0]}]})
    assert found is not None
    assert found["models"][0]["model"] == "checkpoint-1/unet"
