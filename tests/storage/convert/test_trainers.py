"""Checkpoints as DeepSpeed, Composer, timm and Lightning's callbacks lay them out."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from merge_rl.errors import CheckpointError
from merge_rl.storage.checkpoints import open_checkpoints, read_manifest
from merge_rl.storage.convert.run import convert
from merge_rl.storage.convert.trajectories import named_like
from merge_rl.storage.files import save_tensors
from tests.storage.convert.test_contents import ref
from tests.storage.convert.test_trajectories import heard, lightning, state

Found = dict[tuple[str | None, str], int | None]


def entries(folder: Path) -> Found:
    """(track, name) -> images."""
    found = read_manifest(folder).checkpoints
    return {(e.track, Path(e.file).stem): e.nimg for e in found}


def weights(folder: Path, track: str | None = None) -> dict[str, Tensor]:
    """Those of the newest checkpoint of a track."""
    opened = open_checkpoints(folder, track=track)
    return dict(opened.read(opened.newest))


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


# ---------------------------------------------------------------------------------------- DeepSpeed


def deepspeed(folder: Path, step: int, module: dict[str, Tensor], zero: bool = False) -> Path:
    """A checkpoint of stage 0, or of stages 1 and 2, whose optimizer is in parts."""
    folder.mkdir(parents=True)
    shapes = [{name: tensor.shape for name, tensor in module.items()}] if zero else None
    data = {
        "module": module, "param_shapes": shapes, "optimizer": None, "global_steps": step,
        "global_samples": 16 * step, "dp_world_size": 2, "ds_version": "0.19.8",
    }  # fmt: skip
    torch.save(data, folder / "mp_rank_00_model_states.pt")
    if zero:
        (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"not read")
    return folder


@pytest.mark.parametrize("zero", [False, True])
def test_the_whole_weights_of_deepspeeds_folders(zero: bool, tmp_path: Path) -> None:
    for step in (10, 20):
        deepspeed(tmp_path / f"run/global_step{step}", step, state(step), zero)
    (tmp_path / "run/latest").write_text("global_step20")
    said = heard(tmp_path / "run", tmp_path / "set", format="deepspeed")
    assert "zero_to_fp32" not in said
    assert "no batch size" not in said  # the images are counted
    assert entries(tmp_path / "set") == {
        ("raw", "global_step10"): 160,
        ("raw", "global_step20"): 320,
    }
    assert same(weights(tmp_path / "set"), state(20))
    rounded = {f"model.{name}": tensor.bfloat16() for name, tensor in state(1).items()}
    folder = deepspeed(tmp_path / "step=3.ckpt/checkpoint", 3, rounded, zero)  # Lightning's
    file = folder / "mp_rank_00_model_states.pt"
    version = {"pytorch-lightning_version": "2.6.6", "epoch": 0, "global_step": 3}
    torch.save({**torch.load(file, weights_only=False), **version}, file)
    said = heard(folder.parent, tmp_path / "other")
    assert weights(tmp_path / "other").keys() == state().keys()
    assert ("in BF16; zero_to_fp32.py writes them in float32" in said) == zero
    assert entries(tmp_path / "other") == {("raw", "step=3"): 48}


def test_deepspeeds_parts_are_for_its_own_program(tmp_path: Path) -> None:
    empty = {name: torch.empty(0) for name in state()}
    folder = deepspeed(tmp_path / "global_step5", 5, empty, zero=True)
    part = folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    (folder / "mp_rank_00_model_states.pt").rename(part)
    for source in (tmp_path, folder, part):
        with pytest.raises(
            CheckpointError, match=r"DeepSpeed in parts \(zero_pp.*expected what zero_to_fp32\.py"
        ):
            convert(source, tmp_path / "out")
    with pytest.raises(
        CheckpointError, match=r"optim_states\.pt: the state of an optimizer, and no"
    ):
        convert(folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------- Composer


def composer(path: Path, model: dict[str, Tensor], algorithms: list[Any]) -> None:
    wrapped = {f"net.{name}": tensor for name, tensor in model.items()}
    times = {"epoch": 1, "batch": 40, "sample": 320, "total_wct": datetime.timedelta(seconds=3)}
    kept = {
        "model": wrapped, "optimizers": {}, "algorithms": algorithms, "run_name": "a",
        "timestamp": {"Timestamp": times}, "metadata": {"torch_version": torch.__version__},
    }  # fmt: skip
    torch.save({"state": kept, "rng": []}, path)


def test_composers_average_is_in_the_place_of_the_weights(tmp_path: Path) -> None:
    file = tmp_path / "ep1-ba40-rank0.pt"
    composer(file, state(1), [])
    convert(file, tmp_path / "plain", format="composer")
    assert entries(tmp_path / "plain") == {("raw", "ep1-ba40-rank0"): 320}
    assert same(weights(tmp_path / "plain"), state(1))
    other = {f"net.{name}": tensor for name, tensor in state(2).items()}
    *parameters, buffer = other
    parts = {
        "named_parameters_dict": {name: other[name] for name in parameters},
        "named_buffers_dict": {buffer: other[buffer]},
    }
    for active, raw in ((True, 2), (False, 1)):
        ema = {"repr": "<EMA>", "ema_model": parts, "ema_weights_active": active}
        composer(file, state(1), [("EMA", ema)])
        convert(file, tmp_path / f"{active}", weights="both")
        assert same(weights(tmp_path / f"{active}", "raw"), state(raw))
        assert same(weights(tmp_path / f"{active}", "ema"), state(3 - raw))


# ---------------------------------------------------------------------------- Lightning, accelerate


def test_lightnings_stochastic_average_counts_once_it_has_begun(tmp_path: Path) -> None:
    average = {f"model.{name}": tensor for name, tensor in state(7).items()}
    for count, track in ((0, "raw"), (3, "ema")):
        kept = {"n_averaged": count, "average_model_state": average}
        torch.save(lightning(5, callbacks={"StochasticWeightAveraging": kept}), tmp_path / "a.ckpt")
        convert(tmp_path / "a.ckpt", tmp_path / track)
        assert entries(tmp_path / track) == {(track, "a"): 1280}
        assert same(weights(tmp_path / track), state(7 if count else 5))


def test_lightnings_images_are_its_batches(tmp_path: Path) -> None:
    """Steps leave out what gradients accumulate over, and count each of two optimizers."""
    progress = {"epoch_loop.batch_progress": {"total": {"ready": 40, "completed": 39}}}
    cases: list[tuple[dict[str, int], dict[str, Any], int, bool]] = [
        ({"batch_size": 8}, {}, 320, True),
        ({"batch_size": 8, "accumulate_grad_batches": 2}, {}, 320, True),
        ({"batch_size": 8, "world_size": 2}, {}, 640, False),
        ({"global_batch_size": 16}, {}, 320, False),
        ({"batch_size": 8}, {"images_per_step": 5}, 100, False),
        ({}, {}, 20 * 256, False),
    ]
    for number, (settings, more, images, assumed) in enumerate(cases):
        data = lightning(20, hyper_parameters=settings) | {"loops": {"fit_loop": progress}}
        torch.save(data, tmp_path / "a.ckpt")
        said = heard(tmp_path / "a.ckpt", tmp_path / f"{number}", **more)
        assert ("batch_size 8 taken for one process (--images-per-step)" in said) == assumed
        assert entries(tmp_path / f"{number}") == {("raw", "a"): images}


def test_averages_that_accelerate_keeps_of_a_module(tmp_path: Path) -> None:
    folder = tmp_path / "run/checkpoint-2"
    folder.mkdir(parents=True)
    raw = {f"net.{name}": tensor for name, tensor in state(1).items()}
    save_tensors(folder / "model.safetensors", raw, {"format": "pt"})
    (folder / "optimizer.bin").touch()
    average = {f"module.net.{name}": tensor for name, tensor in state(2).items()}
    torch.save({"n_averaged": torch.tensor(3), **average}, folder / "custom_checkpoint_0.pkl")
    convert(tmp_path / "run", tmp_path / "set", weights="both")
    expected = {f"net.{name}": tensor for name, tensor in state(2).items()}
    assert same(weights(tmp_path / "set", "ema"), expected)
    assert same(weights(tmp_path / "set", "raw"), raw)


def test_a_network_beside_accelerates_first(tmp_path: Path) -> None:
    for step in (1, 2):
        folder = tmp_path / f"run/checkpoint-{step}"
        folder.mkdir(parents=True)
        save_tensors(folder / "model.safetensors", {"d.weight": torch.ones(1)}, {"format": "pt"})
        save_tensors(folder / "model_1.safetensors", state(step), {"format": "pt"})
        (folder / "optimizer.bin").touch()
    convert(tmp_path / "run", tmp_path / "set", part="model_1", images_per_step=1)
    assert entries(tmp_path / "set") == {(None, "checkpoint-1"): 1, (None, "checkpoint-2"): 2}
    assert same(weights(tmp_path / "set"), state(2))


def test_averages_in_the_order_of_the_weights_may_lack_some() -> None:
    weights = {"pos": ref(7), "a": ref(2), "sigmas": ref(5), "b": ref(2), "bn.running_mean": ref(2)}
    values = [ref(2), ref(2)]
    with_sigmas = [values[0], ref(5), values[1]]
    assert named_like(with_sigmas, weights) == {
        **weights, "a": values[0], "sigmas": with_sigmas[1], "b": values[1]
    }  # fmt: skip
    assert named_like(values, weights) is None  # less than half of them
    short = {name: weights[name] for name in ("a", "b", "sigmas")}
    assert named_like(values, short) == {**short, "a": values[0], "b": values[1]}
    assert named_like([*values, ref(5)], {**short, "y": ref(5)}) is None  # sigmas, or y
    assert named_like([ref(5), *values], short) is None  # another order
    normed = {"a": ref(2), "bn.running_mean": ref(2), "b": ref(2)}  # no parameter by its name
    assert named_like(values, normed) == {**normed, "a": values[0], "b": values[1]}


# ------------------------------------------------------------------------------------ other layouts


class Net(nn.Module):
    def __init__(self, seed: float) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2, bias=False)
        self.load_state_dict(state(seed))


def test_averaged_modules_beside_their_networks(tmp_path: Path) -> None:
    average = AveragedModel(Net(2)).state_dict()
    online = {f"online_model.{name}": tensor for name, tensor in state(1).items()}
    ema = {f"ema_model.{name}": tensor for name, tensor in state(2).items()}
    own = {"initted": torch.tensor(True), "step": torch.tensor(9), **online, **ema}  # ema-pytorch's
    for number, data in enumerate(
        (
            {"state_dict": state(1), "state_dict_ema": state(2), "epoch": 3},  # timm's
            {"model": state(1), "ema": average},
            {"state_dict": state(1), "swa_state_dict": average},
            {"model": state(1), "ema": own},
            own,
        )
    ):
        out = tmp_path / f"{number}"
        torch.save(data, tmp_path / "checkpoint-3.pth.tar")
        convert(tmp_path, out, weights="both")  # the folder
        assert entries(out) == {("raw", "checkpoint-3"): None, ("ema", "checkpoint-3"): None}
        assert same(weights(out, "raw"), state(1))
        assert same(weights(out, "ema"), state(2))
    alone = average | {f"module.more.{i}": torch.ones(1) for i in range(5)}
    torch.save(alone, tmp_path / "checkpoint-3.pth.tar")
    assert "the file holds beside it: n_averaged" in heard(tmp_path, tmp_path / "alone")
    assert same(
        weights(tmp_path / "alone"), state(2) | {f"more.{i}": torch.ones(1) for i in range(5)}
    )
