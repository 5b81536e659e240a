"""A set of SiT checkpoints: the position table is carried, and must be the same in all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import merge_rl as mrl
from merge_rl.errors import IncompatibleCheckpointError
from merge_rl.models.sit import SiT
from merge_rl.storage.checkpoints import (
    load_checkpoints,
    merge_into_memory,
    plan_merge,
    save_checkpoint,
)
from merge_rl.storage.checkpoints.plan import carried_names
from merge_rl.storage.files.atomic import write_json

CONFIG: dict[str, Any] = {
    "model": "sit",
    "input_size": 8,
    "patch_size": 4,
    "in_channels": 1,
    "hidden_size": 8,
    "depth": 1,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "class_dropout_prob": 0.1,
    "num_classes": 3,
    "learn_sigma": False,
}
OPTIONS = {key: value for key, value in CONFIG.items() if key != "model"}


def random_weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = SiT(**OPTIONS).state_dict()
    moved = {name: torch.randn(t.shape, generator=generator) for name, t in state.items()}
    return {**moved, "pos_embed": state["pos_embed"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three checkpoints, 100, 200 and 300 kimg, whose names tell nothing but their order."""
    write_json(tmp_path / "set/config.json", CONFIG)
    for i in (1, 2, 3):
        save_checkpoint(tmp_path / f"set/a{i}.safetensors", random_weights(i))
    return tmp_path / "set"


def test_the_position_table_is_carried(folder: Path) -> None:
    opened = mrl.open_checkpoints(folder)
    assert carried_names(SiT(**OPTIONS)) == {"pos_embed"}
    plan = plan_merge(opened)
    assert plan.carried == ("pos_embed",)
    # Coefficients that do not sum to 1 would scale an averaged table.
    row = [0.5, 0.25, 1.5]
    for weights in (
        mrl.merge(opened, row),
        load_checkpoints(opened, plan, "disk").weights(torch.tensor(row)),
        {k: outs[0] for k, outs in merge_into_memory(opened, plan, [[row]]).items()},
    ):
        assert torch.equal(weights["pos_embed"], opened.read(0)["pos_embed"])
        name = "blocks.0.attn.qkv.weight"
        expected = sum(c * opened.read(i)[name].double() for i, c in enumerate(row))
        torch.testing.assert_close(weights[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_tables_that_differ_are_refused(folder: Path) -> None:
    weights = random_weights(2)
    weights["pos_embed"][0, 1, 2] += 1e-6
    save_checkpoint(folder / "a2.safetensors", weights)
    message = (
        r"a2\.safetensors: the constant 'pos_embed' differs from that of a1\.safetensors; "
        "expected checkpoints of one run"
    )
    with pytest.raises(IncompatibleCheckpointError, match=message):
        mrl.merge(mrl.open_checkpoints(folder), [0.2, 0.3, 0.5])


def test_a_table_of_its_own_is_kept(folder: Path, tmp_path: Path) -> None:
    table = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(5))
    for i in (1, 2, 3):
        weights = {**random_weights(i), "pos_embed": table}
        save_checkpoint(folder / f"a{i}.safetensors", weights)
    opened = mrl.open_checkpoints(folder)
    merged = mrl.merge(opened, [1 / 3] * 3)
    out = mrl.save_model(tmp_path / "out", merged, opened.config)
    model = mrl.load_model(out)
    assert isinstance(model, SiT)
    assert torch.equal(model.pos_embed, table)
    assert (model.label_dim, model.null_label, model.training) == (3, 3, False)
