"""Tensors that are not the network's own are found, whatever is odd about them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import merge_rl as mrl
from merge_rl.errors import IncompatibleCheckpointError, MergeRLError
from merge_rl.registry import build_model
from merge_rl.storage.checkpoints.model_file import require_network, save_checkpoint
from merge_rl.storage.convert.run import convert
from merge_rl.storage.files.shards import WeightStream
from tests.fixtures import TINY_MODEL
from tests.snapshots import write_sit, write_snapshot

SIT: dict[str, Any] = {
    "model": "sit", "input_size": 4, "patch_size": 2, "in_channels": 1, "hidden_size": 8,
    "depth": 2, "num_heads": 2, "num_classes": 3, "learn_sigma": False,
}  # fmt: skip
WEIGHTS = {"edm2": "unet.emb_noise.weight", "sit": "blocks.1.mlp.fc1.weight"}
State = dict[str, Tensor]


def state_of(config: dict[str, Any]) -> State:
    return {name: tensor.half() for name, tensor in build_model(config).state_dict().items()}


def renamed(state: State, name: str, other: str) -> State:
    return {other if key == name else key: tensor for key, tensor in state.items()}


# What is odd: the state dict, and what the refusal says of the tensor `name`.
ODD: dict[str, tuple[Callable[[State, str], State], str]] = {
    "lacks one": (
        lambda state, name: {key: t for key, t in state.items() if key != name},
        r"1 differ, first '{name}': found missing, expected a floating type {shape}",
    ),
    "one too many": (
        lambda state, name: {**state, "extra": torch.ones(2)},
        r"1 differ, first 'extra': found float32 \[2\], expected no such tensor",
    ),
    "whole numbers": (
        lambda state, name: {**state, name: state[name].to(torch.int64)},
        r"1 differ, first '{name}': found int64 {shape}, expected a floating type {shape}",
    ),
    "yes and no": (
        lambda state, name: {**state, name: state[name] > 0},
        r"1 differ, first '{name}': found bool {shape}, expected a floating type {shape}",
    ),
    "axes turned": (
        lambda state, name: {**state, name: state[name].T.reshape(-1, len(state[name]) // 2)},
        r"1 differ, first '{name}': found float16 .*, expected a floating type {shape}",
    ),
    "an axis more": (
        lambda state, name: {**state, name: state[name][None]},
        r"1 differ, first '{name}': found float16 \[1, .*, expected a floating type {shape}",
    ),
    "a dot too many": (
        lambda state, name: renamed(state, name, name.replace(".", "..", 1)),
        r"2 differ, first '{name}': found missing",
    ),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("config", [TINY_MODEL, SIT], ids=["edm2", "sit"])
def test_odd_tensors_are_found(config: dict[str, Any], odd: str) -> None:
    state, name = state_of(config), WEIGHTS[str(config["model"])]
    require_network(WeightStream.of(state).infos, config, "here")
    change, message = ODD[odd]
    shape = str(list(state[name].shape)).replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(
        IncompatibleCheckpointError, match="^here: .*" + message.format(name=name, shape=shape)
    ):
        require_network(WeightStream.of(change(state, name)).infos, config, "here")


def test_what_is_no_network_of_ours_is_left_alone() -> None:
    infos = WeightStream.of({"a": torch.ones(2)}).infos
    require_network(infos, None, "here")
    require_network(infos, {"_class_name": "AutoencoderKL"}, "here")
    with pytest.raises(IncompatibleCheckpointError, match="here: unknown model 'edm3'; did you"):
        require_network(infos, {"model": "edm3"}, "here")
    with pytest.raises(IncompatibleCheckpointError, match="here: the edm2 network does not take"):
        require_network(infos, {**TINY_MODEL, "depth": 1}, "here")


@pytest.mark.parametrize(
    "change", [{"depth": 2**30}, {"depth": 10**30}, {"hidden_size": 2**40}, {"input_size": 2**30}]
)
def test_a_config_that_asks_for_too_much_is_refused_at_once(change: dict[str, int]) -> None:
    infos, began = WeightStream.of(state_of(SIT)).infos, time.process_time()
    with pytest.raises(MergeRLError):
        require_network(infos, {**SIT, **change}, "here")
    assert time.process_time() - began < 10


# ------------------------------------------------------------------------- whoever is handed them


def write_edm2(path: Path, state: State) -> None:
    options = {key: value for key, value in TINY_MODEL.items() if key != "model"}
    write_snapshot(path, state, options, encoder="rgb")


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("kind", ["snapshot", "bare edm2", "edm2 tensors", "sit", "sit tensors"])
def test_odd_sources_are_not_converted(kind: str, odd: str, tmp_path: Path) -> None:
    family = "sit" if kind.startswith("sit") else "edm2"
    config = SIT if family == "sit" else TINY_MODEL
    state = state_of(config)

    def write(name: str, content: State) -> Path:
        ending = {"snapshot": ".pkl", "edm2 tensors": ".safetensors", "sit tensors": ".safetensors"}
        path = tmp_path / (name + ending.get(kind, ".pt"))
        if kind == "snapshot":
            write_edm2(path, content)
        elif kind == "sit":
            write_sit(path, content, None, num_classes=3, prediction="v")
        elif kind == "bare edm2":
            torch.save(content, path)
        else:
            save_checkpoint(path, content, {"config": config})
        return path

    hints: Any = {"num_heads": 2} if family == "sit" else {}
    bad = write("bad", ODD[odd][0](state, WEIGHTS[family]))
    if kind != "bare edm2":  # it takes a config from a snapshot beside it
        assert len(convert(write("good", state), tmp_path / "good", **hints).written) == 1
        with pytest.raises(MergeRLError, match="bad"):
            convert(bad, tmp_path / "good", **hints)
    with pytest.raises(MergeRLError, match="bad"):
        convert(bad, tmp_path / "out", **hints)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("odd", ODD)
def test_inspect_finds_odd_sets(odd: str, tmp_path: Path, mergerl: Any) -> None:
    state, (change, message) = state_of(SIT), ODD[odd]
    name = WEIGHTS["sit"]
    shape = str(list(state[name].shape)).replace("[", r"\[").replace("]", r"\]")
    for i in (1, 2):
        content = {
            key: tensor + i if tensor.is_floating_point() else tensor
            for key, tensor in change(state, name).items()
        }
        save_checkpoint(tmp_path / f"set/{i}.safetensors", content, {"config": SIT})
    for flags in ([], ["--quick"], ["--json"]):
        code, out, err = mergerl("inspect", tmp_path / "set", *flags)
        assert code == 1
        assert re.search("2 of 2 .* not sound; .*" + message.format(name=name, shape=shape), err)
        assert "ok" not in out
    code, _, err = mergerl("inspect", tmp_path / "set/1.safetensors")
    assert code == 1
    assert re.search(message.format(name=name, shape=shape), err)


def test_inspect_accepts_sound_sets(tmp_path: Path, mergerl: Any) -> None:
    for i in (1, 2):
        content = {key: tensor + i for key, tensor in state_of(SIT).items()}
        save_checkpoint(tmp_path / f"set/{i}.safetensors", content, {"config": SIT})
    code, out, err = mergerl("inspect", tmp_path / "set")
    assert (code, err) == (0, "")
    assert out.count("ok") == 2
    assert mergerl("inspect", tmp_path / "set/1.safetensors")[0] == 0
    assert len(mrl.open_checkpoints(tmp_path / "set")) == 2
