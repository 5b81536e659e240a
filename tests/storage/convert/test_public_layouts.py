"""Layouts of public training programs whose networks are of no family here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from merge_rl.errors import CheckpointError
from merge_rl.storage.checkpoints import open_checkpoints
from merge_rl.storage.convert import convert
from merge_rl.storage.files import save_tensors
from tests.snapshots import Persistent, module_state, write_snapshot
from tests.storage.convert.test_programs import OPTIMIZER, net, read
from tests.storage.convert.test_trajectories import heard


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


NAMES = ("enc.0.weight", "enc.0.bias", "enc.freqs", "enc.1.weight", "enc.1.bias")


def averaging(step: int) -> dict[str, Tensor]:
    """flow_matching's `EMA`: weights, a count, and the average of what is trained in order."""
    raw = {f"model.{name}": torch.full((3, 2 + i), float(step)) for i, name in enumerate(NAMES)}
    trained = [tensor for name, tensor in raw.items() if "freqs" not in name]
    average = {f"shadow_params.{i}": tensor + 0.5 for i, tensor in enumerate(trained)}
    return {**raw, "num_updates": torch.tensor(step), **average}


@pytest.mark.parametrize(("weights", "more"), [("auto", 0.5), ("model", 0.0)])
def test_a_module_that_averages_numbers_its_average(
    weights: str, more: float, tmp_path: Path
) -> None:
    torch.save({"model": averaging(7), "optimizer": OPTIMIZER, "epoch": 3}, tmp_path / "c.pth")
    convert(tmp_path / "c.pth", tmp_path / "out", weights=weights)
    found = open_checkpoints(tmp_path / "out").read(0)
    shapes = {name: (3, 2 + i) for i, name in enumerate(NAMES)}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes
    values = {name: float(tensor.flatten()[0]) for name, tensor in found.items()}
    assert values == {name: 7.0 + more * ("freqs" not in name) for name in NAMES}


def test_numbers_are_no_names_where_a_file_keeps_no_order(tmp_path: Path) -> None:
    save_tensors(tmp_path / "c.safetensors", averaging(7))
    with pytest.raises(CheckpointError, match="found '0', no name of a module's part"):
        convert(tmp_path / "c.safetensors", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("model000010.pt", 10), ("ema_0.9999_000010.pt", 10), ("checkpoint.10.pt", 10),
        ("ckpt_0.123456_10.pt", 10), ("epoch_1_step_10.pth", 10), ("epoch_10.pth", None),
        ("best_0.5.pt", None), ("weights.pt", None),
    ],
)  # fmt: skip
def test_the_last_number_counts_steps_where_the_images_of_one_are_said(
    name: str, steps: int | None, tmp_path: Path
) -> None:
    torch.save(net(1), tmp_path / name)
    told = heard(tmp_path / name, tmp_path / "out", images_per_step=4)
    assert [nimg for _, nimg, _ in read(tmp_path / "out").values()] == [steps and 4 * steps]
    assert ("no step said, by the file or by what it is called" in told) == (steps is None)


def test_numbers_of_epochs_that_a_file_says_are_no_steps(tmp_path: Path) -> None:
    torch.save({"model": net(1), "epoch": 10}, tmp_path / "checkpoint-10.pth")
    convert(tmp_path / "checkpoint-10.pth", tmp_path / "out", images_per_step=4)
    assert [nimg for _, nimg, _ in read(tmp_path / "out").values()] == [None]


def test_a_target_model_is_a_track_of_its_own(tmp_path: Path) -> None:
    """What consistency models are trained against lies beside weights and averages."""
    (tmp_path / "run").mkdir()
    for step in (10, 20):
        for place, name in enumerate(("model", "target_model", "ema_0.999_")):
            torch.save(net(step + place / 4), tmp_path / f"run/{name}{step:06d}.pt")
    convert(tmp_path / "run", tmp_path / "out", weights="both")
    found = {(track, value) for track, _, value in read(tmp_path / "out").values()}
    expected = {"raw": 0, "target_model": 0.25, "ema-0.999": 0.5}
    assert found == {(t, step + more) for t, more in expected.items() for step in (10, 20)}
    convert(tmp_path / "run", tmp_path / "raw", weights="model")
    assert [value for _, _, value in read(tmp_path / "raw").values()] == [10, 20]


def test_scores_before_steps_are_no_order(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for step, loss in ((2000, 0.25), (10000, 0.125), (30000, 12.5)):
        torch.save(net(step), tmp_path / f"run/ckpt_{loss:.6f}_{step}.pt")
    convert(tmp_path / "run", tmp_path / "out")
    assert [value for _, _, value in read(tmp_path / "out").values()] == [2000, 10000, 30000]
