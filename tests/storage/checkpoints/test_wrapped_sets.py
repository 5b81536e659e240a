"""Sets whose files name tensors as compiled, parallel or averaged models do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import merge_rl as mrl
from merge_rl.storage.checkpoints import open_checkpoints, open_model_file, save_checkpoint
from merge_rl.storage.files import MODEL_NAME, WeightStream, write_weights
from merge_rl.workflows.assembly import find_model
from tests.finetuning import SIT, sit_weights

Wrap = Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]]


def prefixed(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


# How a file holds an average (the one that is meant) or raw weights.
WRAPS: dict[str, Wrap] = {
    "compiled": lambda own, _: prefixed("_orig_mod.", own),
    "parallel": lambda own, _: prefixed("module._orig_mod.", own),
    "averaged": lambda own, _: {"n_averaged": torch.tensor(7), **prefixed("module.", own)},
    "beside": lambda own, raw: {**prefixed("model.", raw), **prefixed("ema.", own)},
    "plain": lambda own, _: own,
}


@pytest.fixture(params=list(WRAPS))
def wrapped(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Three checkpoints; the last differs in how it is wrapped."""
    folder = tmp_path / "set"
    for step in (1, 2, 3):
        wrap = WRAPS["plain" if step == 3 else request.param]
        path = folder / f"step_{step}.safetensors"
        save_checkpoint(path, wrap(sit_weights(step), sit_weights(10 + step)))
    (folder / "config.json").write_text(json.dumps(SIT))
    return folder


def test_a_set_has_the_names_of_its_network(wrapped: Path) -> None:
    opened = open_checkpoints(wrapped)
    own = sit_weights(1)
    assert set(opened.tensors) == set(own)
    for name, tensor in own.items():
        assert torch.equal(opened.read_tensor(0, name), tensor)
        assert torch.equal(opened.mapped(0)[name], tensor)
    assert [check.error for check in opened.verify()] == [None] * 3
    merged = mrl.merge(opened, [0.5, 0.25, 0.25])
    parts = [sit_weights(step) for step in (1, 2, 3)]
    for name in own:
        mean = 0.5 * parts[0][name] + 0.25 * parts[1][name] + 0.25 * parts[2][name]
        torch.testing.assert_close(merged[name], mean)


def test_commands_take_it(wrapped: Path, mergerl: Callable[..., Any]) -> None:
    made = mergerl("merge", wrapped, "out", "--uniform")
    assert made.code == 0, made.err
    assert set(open_model_file("out").weights) == set(sit_weights())
    assert mergerl("inspect", wrapped).code == 0
    assert mergerl("inspect", wrapped / "step_1.safetensors").code == 0
    file = wrapped / "step_1.safetensors"
    left = "took ema." in mergerl("inspect", wrapped).err
    held = open_checkpoints(wrapped)._headers[0].left
    assert left == any(name.startswith("model.") for name in held)
    for said in (mergerl("inspect", file).err, find_model(file).note or ""):
        assert left == ("took ema." in said)


def test_shards_and_repeats_are_seen_through_wrappers(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    stream = WeightStream.of(prefixed("module.", sit_weights(1)))
    folder.mkdir()
    write_weights(folder, stream, {}, max_shard_bytes=2000)
    assert not (folder / MODEL_NAME).exists()
    save_checkpoint(folder / "again.safetensors", prefixed("_orig_mod.", sit_weights(1)))
    save_checkpoint(folder / "other.safetensors", sit_weights(2))
    (folder / "config.json").write_text(json.dumps(SIT))
    opened = open_checkpoints(folder)
    assert len(opened) == 2
    assert len(opened.duplicates) == 1
    assert torch.equal(opened.read_tensor(1, "pos_embed"), sit_weights()["pos_embed"])


@pytest.mark.parametrize("config", [None, {"layers": 2}])
def test_names_of_an_unknown_network_stay(tmp_path: Path, config: dict[str, Any] | None) -> None:
    for step in (1, 2):
        save_checkpoint(
            tmp_path / f"{step}.safetensors",
            {"model.w": torch.ones(2), "net.w": torch.full((2,), step)},
        )
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert set(open_checkpoints(tmp_path).tensors) == {"model.w", "net.w"}
