"""Layouts of public training programs whose networks are of no family here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from merge_rl.errors import CheckpointError
from merge_rl.storage.convert import convert
from tests.snapshots import Persistent, module_state, write_snapshot
from tests.storage.convert.test_programs import OPTIMIZER, net, read


def edm_network(value: float) -> Persistent:
    """EDM's network as it is pickled: a class with its source, and another within."""
    weights = {name: nn.Parameter(t, requires_grad=False) for name, t in net(value).items()}
    inner = module_state(_parameters={k.partition(".")[2]: t for k, t in weights.items()})
    outer = {"enc": Persistent("Conv2d", inner)}
    return Persistent("EDMPrecond", module_state(_modules=outer))


def test_snapshots_before_edm2_are_the_tensors_of_their_networks(tmp_path: Path) -> None:
    for kimg in (200, 1000):
        path = tmp_path / f"run/network-snapshot-{kimg:06d}.pkl"
        path.parent.mkdir(exist_ok=True)
        pipe = Persistent("AugmentPipe", module_state(_buffers={"Hz": torch.ones(2)}))
        write_snapshot(path, {}, {}, encoder=None, ema=edm_network(kimg), augment_pipe=pipe)
    convert(tmp_path / "run", tmp_path / "out")
    expected = [("ema", 200_000, 200.0), ("ema", 1_000_000, 1000.0)]
    assert list(read(tmp_path / "out").values()) == expected


def ddim_state(step: int) -> list[object]:
    """What DDIM's program saves: weights, optimizer, epoch, step and the average, unnamed."""
    raw: dict[str, Tensor] = {f"module.{name}": tensor for name, tensor in net(step).items()}
    return [raw, OPTIMIZER, 3, step, net(step + 0.5)]


def test_a_list_of_state_dicts_is_read_by_places(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for step in (5, 10):
        torch.save(ddim_state(step), tmp_path / f"run/ckpt_{step}.pth")
    with pytest.raises(
        CheckpointError, match="holds several networks, 0, 4; --part NAME takes one"
    ):
        convert(tmp_path / "run", tmp_path / "out")
    convert(tmp_path / "run", tmp_path / "out", part="4")
    assert [value for _, _, value in read(tmp_path / "out").values()] == [5.5, 10.5]


def test_weights_that_lie_deep_are_named(tmp_path: Path) -> None:
    """VAR's program has its network and its autoencoder in the state of a trainer."""
    trainer = {"var_wo_ddp": net(1), "vae_local": net(2), "config": {"depth": 16}}
    torch.save({"epoch": 3, "trainer": trainer}, tmp_path / "ar-ckpt-last.pth")
    told = "holds tensors in trainer/var_wo_ddp and trainer/vae_local; --part NAME takes those"
    with pytest.raises(CheckpointError, match=told):
        convert(tmp_path / "ar-ckpt-last.pth", tmp_path / "out")
    convert(tmp_path / "ar-ckpt-last.pth", tmp_path / "out", part="var_wo_ddp")
    assert [value for _, _, value in read(tmp_path / "out").values()] == [1.0]
