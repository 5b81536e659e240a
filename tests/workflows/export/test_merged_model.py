"""A merged model under the verbs of the Hub's libraries, and its recipe in mergekit's words."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
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


@pytest.fixture
def guided(raw: CheckpointSet, merged: Path) -> Path:
    """The merge with guidance that was searched with it, by a merge in its folder."""
    sampler = {"num_steps": 2, "guidance": 3.0, "guide": "guide"}
    recipe = yaml.safe_load((merged / "merge.yaml").read_text()) | {"sampler": sampler}
    (merged / "merge.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    mrl.save_model(merged / "guide", raw.read(0), raw.config)
    return merged


def test_guidance_goes_along_with_a_merge(
    guided: Path, tmp_path: Path, hub: HubServer, mergerl: Callable[..., Any]
) -> None:
    weaker = mrl.load_model(guided / "guide")
    noise, labels = torch.randn(2, *weaker.sample_shape), torch.tensor([1, 2])
    expected = mrl.sample(
        mrl.load_model(guided), noise, labels, guide=weaker, num_steps=2, guidance=3.0
    )
    mrl.push(guided, "user/guided")
    model = mrl.MergedModel.from_pretrained("user/guided")
    assert model.recipe is not None
    for found in (model, mrl.MergedModel.from_pretrained(model.save_pretrained(tmp_path / "kept"))):
        assert torch.equal(found.sample(noise, labels), expected)
    assert not torch.equal(model.sample(noise, labels, guidance=1.0), expected)
    drawn = [mergerl("sample", place, "--num-images", 2, "--out", f"{i}.png")
             for i, place in enumerate((guided, "user/guided"))]  # fmt: skip
    assert [ended.code for ended in drawn] == [0, 0], drawn
    assert Path("0.png").read_bytes() == Path("1.png").read_bytes()
    # A guide that was not merged is a name in the recipe: it has to be said where it is.
    hub.repos["user/guided"].files = {
        name: data.replace(b"guide: guide", b"guide: weaker")
        for name, data in hub.repos["user/guided"].files.items()
    }
    hub.repos["user/guided"].commit("elsewhere")
    model = mrl.MergedModel.from_pretrained("user/guided")
    assert torch.equal(model.sample(noise, labels, guide=weaker), expected)
    with pytest.raises(ConfigError, match="the recipe names the guide weaker, expected guide="):
        model.sample(noise, labels)


def test_scores_are_of_what_the_recipe_samples(guided: Path, shared_tiny: Path) -> None:
    files = shared_tiny / "evaluation"
    options: dict[str, Any] = {
        "reference": files / "reference.safetensors", "extractor": "digits", "num_images": 80,
        "extractor_weights": str(files / "extractor.safetensors"), "progress": False,
    }  # fmt: skip
    found = mrl.evaluate(guided, repeats=2, **options)
    weaker, sampler = guided / "guide", mrl.SamplerConfig(num_steps=2, guidance=3.0)
    sampler = dataclasses.replace(sampler, guide=str(weaker))
    assert found["fid"] == mrl.evaluate(guided, repeats=2, sampler=sampler, **options)["fid"]
    plain = dataclasses.replace(sampler, guidance=1.0)
    assert found["fid"] != mrl.evaluate(guided, repeats=2, sampler=plain, **options)["fid"]


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
    rows = {"a": 0.5, "b": 0.0, "c": 0.5 + 9e-7}  # what gives nothing is not named
    three = [{"file": f"{name}.safetensors", "coefficients": [w]} for name, w in rows.items()]
    found = mergekit_document({"sources": three})
    assert found is not None
    assert [model["model"] for model in found["models"]] == ["a", "c"]
