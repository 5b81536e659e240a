"""A model in shards is read wherever a model in one file is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_rl.errors import CheckpointError
from merge_rl.storage.checkpoints import (
    load_checkpoints,
    open_checkpoints,
    open_model_file,
    plan_merge,
)
from merge_rl.storage.convert import convert
from merge_rl.storage.files import weights_in
from merge_rl.workflows.export import merge, save_model

Command = Callable[..., Any]


@pytest.fixture
def models(tiny: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The same average in one file and in shards."""
    opened = open_checkpoints(tiny, track="raw")
    weights = merge(opened, [1 / len(opened)] * len(opened))
    whole = save_model(tmp_path / "whole", weights, opened.config)
    shards = save_model(tmp_path / "shards", weights, opened.config, max_shard_bytes=4000)
    assert len(list(shards.glob("*.safetensors"))) > 2
    return whole, shards


def test_shards_are_one_checkpoint_of_a_set(models: tuple[Path, Path]) -> None:
    whole, shards = map(open_checkpoints, models)
    assert shards.names == whole.names == ("model",)
    assert shards.config == whole.config
    assert shards.tensors == whole.tensors
    assert all(check.ok for check in shards.verify())
    expected = whole.read(0)
    for found in (shards.read(0), shards.mapped(0), merge(shards, [1.0])):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    plan = plan_merge(shards)
    for place in ("cpu", "disk"):
        one = load_checkpoints(shards, plan, place).weights(torch.ones(1, 1, dtype=torch.float64))
        assert all(torch.equal(one[name], expected[name]) for name in expected)


def test_the_index_means_its_model(models: tuple[Path, Path]) -> None:
    whole, shards = models
    (index,) = weights_in(shards)
    assert index.name == "model.safetensors.index.json"
    found, expected = open_model_file(index), open_model_file(whole)
    assert found.config == expected.config
    assert all(torch.equal(found.weights[name], t) for name, t in expected.weights.items())


def test_shards_are_converted(models: tuple[Path, Path], tmp_path: Path) -> None:
    whole, shards = models
    size = sum(file.stat().st_size for file in shards.glob("*.safetensors"))
    result = convert(shards, tmp_path / "set", delete_source=True)
    assert [path.name for path in result.written] == ["model.safetensors"]
    converted, expected = open_model_file(result.written[0]), open_model_file(whole)
    assert converted.config == expected.config
    assert all(torch.equal(converted.weights[name], t) for name, t in expected.weights.items())
    # The index and every shard: what was made of them is read back first.
    assert weights_in(shards) == []
    assert size > result.written[0].stat().st_size > 0


def test_two_models_of_a_folder_are_two(models: tuple[Path, Path], tmp_path: Path) -> None:
    whole, shards = models
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    (shards / "step_2.safetensors.index.json").write_text(json.dumps(index))
    shutil.copyfile(whole / "model.safetensors", shards / "step_10.safetensors")
    assert [path.name.partition(".")[0] for path in weights_in(shards)] == [
        "model", "step_2", "step_10"
    ]  # fmt: skip
    # Shards under two indexes, and a copy in one file, are one checkpoint.
    assert open_checkpoints(shards).names == ("step_2",)
    assert open_checkpoints(shards, distinct=False).duplicates == {
        "model": "step_2", "step_10": "step_2"
    }  # fmt: skip


def test_a_shard_that_is_lost_is_named(models: tuple[Path, Path]) -> None:
    lost = sorted(models[1].glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"{lost.name}: no such file"):
        open_checkpoints(models[1])
    with pytest.raises(CheckpointError, match=f"{lost.name}: no such file"):
        open_model_file(models[1])


def test_commands_take_shards(models: tuple[Path, Path], mergerl: Command, tmp_path: Path) -> None:
    inspected = mergerl("inspect", models[1], "--json")
    assert inspected.code == 0, inspected.err
    document = json.loads(inspected.out)
    assert (document["kind"], document["network"]) == ("model", "edm2")
    merged = mergerl("merge", models[1], tmp_path / "again", "--uniform")
    assert merged.code == 0, merged.err
    again, whole = open_model_file(tmp_path / "again"), open_model_file(models[0])
    assert all(torch.equal(again.weights[name], t) for name, t in whole.weights.items())
