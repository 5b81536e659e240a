"""Checkpoints as training libraries write them: post-hoc EMAs, Lightning, folders, adapters."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from merge_rl.config import MergeConfig, SearchConfig
from merge_rl.core.merging.ema_profiles import exponent_from_std, sparse_profile, std_from_exponent
from merge_rl.errors import CheckpointError, ConfigError, IncompatibleCheckpointError
from merge_rl.searchers import SearchSpace
from merge_rl.searchers.baselines import EmaGrid
from merge_rl.storage.checkpoints import open_checkpoints, read_manifest
from merge_rl.storage.convert.distcp import PiecedRef, _require_cover
from merge_rl.storage.convert.run import convert
from merge_rl.storage.convert.trajectories import parse_widths
from merge_rl.storage.files import save_tensors
from merge_rl.storage.pickles import read_data
from merge_rl.workflows.assembly.job import build_map
from merge_rl.workflows.export import ema_coefficients, merge
from tests.storage.convert.test_states import Ear, named

State = dict[str, Tensor]


def state(seed: float = 0) -> State:
    """Weights of a small network that no family has."""
    generator = torch.Generator().manual_seed(int(100 * seed))
    return {
        "first.weight": torch.randn(4, 3, generator=generator),
        "first.bias": torch.randn(4, generator=generator),
        "last.weight": torch.randn(2, 4, generator=generator),
    }


def write_posthoc(folder: Path, steps: list[int], indices: int = 2) -> None:
    """As ema-pytorch writes: one flat state dict a file, all of it float16."""
    folder.mkdir()
    for index in range(indices):
        for step in steps:
            flat = {"initted": torch.tensor(True), "step": torch.tensor(step)}
            flat |= {f"ema_model.{k}": v for k, v in state(index + step).items()}
            torch.save({k: v.half() for k, v in flat.items()}, folder / f"{index}.{step}.pt")


def heard(sources: object, out: Path, **settings: Any) -> str:
    ear = Ear()
    convert(sources, out, tracker=ear, **settings)  # type: ignore[arg-type]
    return "\n".join(ear.heard)


# ----------------------------------------------------------------------------- post-hoc EMA folders


@pytest.fixture(scope="module")
def posthoc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four times of two averages, the last beyond what float16 holds, converted."""
    folder = tmp_path_factory.mktemp("posthoc")
    write_posthoc(folder / "run", [20_000, 40_000, 60_000, 80_000])
    convert(folder / "run", folder / "set", ema_std="0.05,0.28", update_every=10, images_per_step=8)
    return folder


def test_averages_have_the_profiles_of_seldom_updates(posthoc: Path) -> None:
    opened = open_checkpoints(posthoc / "set")
    assert len(opened) == 8
    assert opened.config is None
    assert set(opened.nimg) == {160_000, 320_000, 480_000, 640_000}
    (narrow, start), (wide, _) = (
        sparse_profile(exponent_from_std(std), 10) for std in (0.05, 0.28)
    )
    assert opened.ema_start == pytest.approx(8 * start)
    for entry in opened.entries:
        if entry.track == "ema-0":
            assert entry.ema_std == pytest.approx(std_from_exponent(narrow))
            assert entry.ema_gamma is None
        else:
            assert entry.ema_std is None
            assert entry.ema_gamma == pytest.approx(wide)
    # Of the newest time the narrower average, with the weights that were in its file.
    assert opened.names[opened.newest] == "step-80000-ema-0"
    expected = {k: v.half() for k, v in state(80_000).items()}
    found = opened.read(opened.newest)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_profiles_are_rebuilt_from_them(posthoc: Path) -> None:
    opened = open_checkpoints(posthoc / "set")
    row = ema_coefficients(opened, 0.2)
    assert float(row.sum()) == pytest.approx(1)
    merged = merge(opened, row)
    expected = sum(float(c) * opened.read(i)["first.weight"].double() for i, c in enumerate(row))
    torch.testing.assert_close(merged["first.weight"].double(), expected, rtol=1e-4, atol=1e-3)
    # The average itself, where it is what is asked for.
    own = ema_coefficients(opened, float(opened.ema_std[opened.newest] or 0))
    torch.testing.assert_close(own, torch.eye(8)[opened.newest].double(), rtol=0, atol=1e-6)


def test_the_searches_for_profiles_begin_at_them(posthoc: Path) -> None:
    opened = open_checkpoints(posthoc / "set")
    for track in (None, "ema-1"):
        opened = open_checkpoints(posthoc / "set", track=track)
        made = build_map(opened, MergeConfig(map="ema"), 1)
        row = made(torch.zeros(2, dtype=torch.float64))[0]
        assert row.tolist() == torch.eye(len(opened))[opened.newest].tolist()
        moved = made(torch.tensor([-0.5, 0.0]).double())
        assert bool(moved.isfinite().all())
        assert not torch.equal(moved[0], row)
    opened = open_checkpoints(posthoc / "set")
    space = SearchSpace(
        map=build_map(opened, MergeConfig(map="free"), 1), names=opened.names,
        nimg=tuple(opened.nimg), ema_std=tuple(opened.ema_std), profiles=opened.profiles(),
        evaluations=8 * 30,
    )  # fmt: skip
    grid = EmaGrid(SearchConfig(name="ema-grid"), space, 0)
    assert any(label.startswith("exponent -0.883") for label in grid.labels)
    assert any(label.startswith("ema_std 0.25") for label in grid.labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ema_std": "0.05,0.28"}, "expected --update-every .by default 100 in ema-pytorch, 10"),
        ({"ema_std": "0:0.05", "update_every": 1}, "says no width of average 1, only of 0$"),
        (
            {"ema_std": "0.05,0.3", "update_every": 1},
            "widths between 1e-07 and 0.289, got '0.05,0.3'",
        ),
        ({"weights": "model"}, "holds an average, no raw weights"),
        ({"format": "lightning"}, "expected the format lightning, found posthoc-ema"),
    ],
)
def test_what_is_not_said_of_averages_is_asked_for(
    posthoc: Path, tmp_path: Path, settings: Mapping[str, Any], message: str
) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=message):
        convert(posthoc / "run", tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_names_and_steps_that_disagree_are_refused(tmp_path: Path) -> None:
    write_posthoc(tmp_path / "run", [5001, 6000], indices=1)  # 5001 is 5000 in float16
    convert(tmp_path / "run", tmp_path / "out")
    (tmp_path / "run/0.6000.pt").rename(tmp_path / "run/0.7000.pt")
    with pytest.raises(CheckpointError, match=r"name says step 7000, the file itself step 6000$"):
        convert(tmp_path / "run", tmp_path / "other")
    write_posthoc(tmp_path / "late", [70_000], indices=1)  # infinite in float16: the name counts
    (tmp_path / "late/0.70000.pt").rename(tmp_path / "late/0.65519.pt")  # the last that is not
    with pytest.raises(CheckpointError, match="name says step 65519, the file itself step inf"):
        convert(tmp_path / "late", tmp_path / "other")
    (tmp_path / "late/0.65519.pt").rename(tmp_path / "late/0.65520.pt")
    convert(tmp_path / "late", tmp_path / "other")


def test_averages_that_begin_late_count_from_there(tmp_path: Path) -> None:
    # pytorch-posthoc-ema: names without a prefix, and averages from the 100th step on.
    (tmp_path / "run").mkdir()
    for step in (500, 1000):
        counts = {"initted": torch.tensor(True), "step": torch.tensor(step - 99)}
        data = {**state(step), **counts, "sigma_rel": 0.15}
        torch.save(data, tmp_path / f"run/0.{step}.pt")
    said = heard(tmp_path / "run", tmp_path / "out", update_every=1, images_per_step=2)
    assert "begin after 99 steps" in said
    entries = read_manifest(tmp_path / "out").checkpoints
    assert [(entry.nimg, entry.ema_std) for entry in entries] == [(802, 0.15), (1802, 0.15)]
    torch.save({**data, "sigma_rel": -1.0}, tmp_path / "0.1000.pt")
    with pytest.raises(CheckpointError, match=r"expected a width of 1e-07 to 0\.\d+, found -1"):
        convert(tmp_path / "0.1000.pt", tmp_path / "other", update_every=1)
    with pytest.raises(ConfigError, match=r"--ema-std says 0\.1, the file itself 0\.15"):
        convert(tmp_path / "run", tmp_path / "other", update_every=1, ema_std="0.1")
    for width, told in ((0.2, r"0\.2"), (None, "none")):  # of one index
        inside = {} if width is None else {"sigma_rel": width}
        torch.save({**state(), **counts, **inside}, tmp_path / "run/0.1000.pt")
        with pytest.raises(
            CheckpointError,
            match=rf"0\.1000\.pt: says the width {told}, expected 0\.15 as in .*0\.500",
        ):
            convert(tmp_path / "run", tmp_path / "other", update_every=1)
    torch.save({**state(), **counts, "sigma_rel": 0.2}, tmp_path / "run/1.1000.pt")
    (tmp_path / "run/0.1000.pt").unlink()
    convert(tmp_path / "run", tmp_path / "other", update_every=1)  # of two


def test_counters_that_an_average_holds_as_numbers_are_whole_again(tmp_path: Path) -> None:
    write_posthoc(tmp_path / "run", [70_000], indices=1)
    file = tmp_path / "run/0.70000.pt"
    counts = {"bn.num_batches_tracked": 300.0, "ln.num_batches_tracked": 70_000.0}  # the last: inf
    more = {f"ema_model.{name}": torch.tensor(n).half() for name, n in counts.items()}
    torch.save(torch.load(file) | more, file)
    (path,) = convert(tmp_path / "run", tmp_path / "out").written
    found = load_file(path)
    assert [found[name].dtype for name in counts] == [torch.int64] * 2
    assert [found[name].item() for name in counts] == [300, 65_520]


def test_widths_are_listed_by_index() -> None:
    assert parse_widths("0:0.05, 2:0.28") == {0: 0.05, 2: 0.28}
    assert parse_widths("0.05 0.1") == {0: 0.05, 1: 0.1}
    for text in ("", "x:0.1", "0:0.1,0:0.2", "0.1,,x"):
        with pytest.raises(ConfigError, match="expected --ema-std as"):
            parse_widths(text)


def test_a_folder_by_the_library_itself(tmp_path: Path) -> None:
    library = pytest.importorskip("ema_pytorch")
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    emas = library.PostHocEMA(
        net, sigma_rels=(0.05, 0.28), update_every=1, checkpoint_every_num_steps=50,
        checkpoint_folder=str(tmp_path / "run"), checkpoint_dtype=torch.float32,
    )  # fmt: skip
    for _ in range(200):
        with torch.no_grad():
            net.weight += 0.1 * torch.randn(2, 3)
        emas.update()
    convert(tmp_path / "run", tmp_path / "set", ema_std="0.05,0.28", update_every=1)
    opened = open_checkpoints(tmp_path / "set")
    found = merge(opened, ema_coefficients(opened, 0.15))
    expected = emas.synthesize_ema_model(sigma_rel=0.15).ema_model.state_dict()
    # The library lets the sum of its coefficients be what it is, near 1, and knows no start.
    torch.testing.assert_close(found, dict(expected), rtol=2e-3, atol=2e-3)


# ---------------------------------------------------------------------------------------- Lightning


class AttributeDict(dict[str, Any]):
    """As Lightning keeps settings."""


def lightning(steps: int, **more: Any) -> dict[str, Any]:
    module = {f"model.{name}": value for name, value in state(steps).items()}
    return {
        "epoch": 1, "global_step": steps, "pytorch-lightning_version": "2.6.0", "loops": {},
        "state_dict": {**module, "loss.temperature": torch.ones(1)}, "optimizer_states": [], **more,
    }  # fmt: skip


def test_lightning_checkpoints_with_their_settings(tmp_path: Path) -> None:
    with named(lightning__fabric__utilities__data__AttributeDict=AttributeDict):
        for steps in (10, 20):
            settings = AttributeDict(batch_size=32, lr=0.1)
            torch.save(lightning(steps, hyper_parameters=settings), tmp_path / f"step={steps}.ckpt")
    convert(tmp_path, tmp_path / "set", format="lightning")
    opened = open_checkpoints(tmp_path / "set")
    assert opened.nimg == [320, 640]
    assert torch.equal(opened.read(1)["first.weight"], state(20)["first.weight"])


@pytest.mark.parametrize(
    "kept",
    [
        {"callbacks": {"EMA": {"ema_state_dict": {f"model.{k}": v for k, v in state(7).items()}}}},
        {"callbacks": {"EMA": {"ema_weights": [*state(7).values(), torch.ones(1)]}}},
        {
            "current_model_state": lightning(5)["state_dict"],
            "state_dict": {f"model.{k}": v for k, v in state(7).items()},
        },
    ],
    ids=["by name", "in order", "WeightAveraging"],
)
def test_averages_of_lightning_callbacks(tmp_path: Path, kept: Mapping[str, Any]) -> None:
    torch.save(lightning(5, **kept), tmp_path / "a.ckpt")
    convert(tmp_path / "a.ckpt", tmp_path / "set", weights="both")
    opened = open_checkpoints(tmp_path / "set")
    assert opened.tracks == ["raw", "ema"]
    found = {entry.track: opened.read(i) for i, entry in enumerate(opened.entries)}
    assert torch.equal(found["raw"]["first.weight"], state(5)["first.weight"])
    assert torch.equal(found["ema"]["first.weight"], state(7)["first.weight"])


def test_one_part_of_a_model_is_taken_by_name(tmp_path: Path) -> None:
    parts = {f"{part}.{k}": v for part in ("unet", "vae") for k, v in state(len(part)).items()}
    torch.save({"state_dict": parts, "global_step": 3, "epoch": 0}, tmp_path / "a.ckpt")
    convert(tmp_path / "a.ckpt", tmp_path / "set", part="unet")
    opened = open_checkpoints(tmp_path / "set")
    assert torch.equal(opened.read(0)["last.weight"], state(4)["last.weight"])


# ------------------------------------------------------------------------------------------ folders


def test_a_network_under_any_name_is_taken_where_it_is_the_only_one_or_meant(
    tmp_path: Path,
) -> None:
    own = {f"net.{name}" if "first" in name else name: t for name, t in state().items()}
    kept = {
        "score": own,
        "optimizer": {"state": {0: state()}},
        "step": 5,
        "args": {"batch_size": 3},
    }
    for data, part in ((kept, None), ({**kept, "critic": state(1)}, "score")):
        torch.save(data, tmp_path / "a.pt")
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        (path,) = convert(tmp_path / "a.pt", tmp_path / "set", part=part).written
        assert load_file(path).keys() == own.keys()
        assert read_manifest(tmp_path / "set").checkpoints[0].nimg == 15


def test_folders_of_accelerate(tmp_path: Path) -> None:
    for steps in (100, 200):
        folder = tmp_path / f"run/checkpoint-{steps}"
        folder.mkdir(parents=True)
        save_tensors(folder / "model.safetensors", state(steps), {"format": "pt"})
        average = {"initted": torch.tensor(True), "step": torch.tensor(steps)}
        average |= {f"ema_model.{k}": v for k, v in state(steps + 1).items()}
        torch.save(average, folder / "custom_checkpoint_0.pkl")
        torch.save({"state": {}, "param_groups": []}, folder / "optimizer.bin")
        torch.save({"random": [1]}, folder / "random_states_0.pkl")
    convert(tmp_path / "run", tmp_path / "set", weights="both", images_per_step=4)
    entries = read_manifest(tmp_path / "set").checkpoints
    assert [entry.file for entry in entries if entry.track == "ema"] == [
        "ema/checkpoint-100.safetensors", "ema/checkpoint-200.safetensors",
    ]  # fmt: skip
    assert {entry.nimg for entry in entries} == {400, 800}
    ema = open_checkpoints(tmp_path / "set", track="ema")
    assert torch.equal(ema.read(0)["first.bias"], state(101)["first.bias"])
    torch.save(state(7), folder / "custom_checkpoint_0.pkl")  # registered as it is
    save_tensors(folder / "model_1.safetensors", {"d": torch.ones(2)}, {"format": "pt"})
    assert "left the network model_1 (--part model_1)" in heard(folder, tmp_path / "plain")
    registered = load_file(tmp_path / "plain/ema/checkpoint-200.safetensors")
    assert torch.equal(registered["first.bias"], state(7)["first.bias"])
    # The order of an average without names is not that of a safetensors file.
    torch.save({"shadow_params": list(state(9).values())}, folder / "custom_checkpoint_0.pkl")
    said = heard(folder, tmp_path / "other")
    assert "left custom_checkpoint_0.pkl, whose average is a list in the order" in said


def test_a_network_beside_its_average_as_diffusers_saves_them(tmp_path: Path) -> None:
    for part, seed in (("unet", 1), ("unet_ema", 2)):
        folder = tmp_path / "run/checkpoint-7" / part
        folder.mkdir(parents=True)
        save_tensors(folder / "diffusion_pytorch_model.safetensors", state(seed), {})
    convert(tmp_path / "run", tmp_path / "set")
    (entry,) = read_manifest(tmp_path / "set").checkpoints
    assert (entry.track, entry.nimg) == ("ema", 7 * 256)
    found = open_checkpoints(tmp_path / "set").read(0)
    assert torch.equal(found["last.weight"], state(2)["last.weight"])
    # Trainings save no scheduler, without which the network is not known; its weights are.
    (folder.parent / "unet/config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    said = heard(tmp_path / "run/checkpoint-7", tmp_path / "other")
    assert "expected a scheduler_config.json" in said
    assert open_checkpoints(tmp_path / "other").config is None
    (folder.parent / "scheduler").mkdir()
    (folder.parent / "scheduler/scheduler_config.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"raw weights, whose average lies beside them in unet_ema; name that"
    ):
        convert(folder.parent / "unet", tmp_path / "raw")


def test_a_series_of_folders_is_a_set_as_it_is(tmp_path: Path) -> None:
    for steps in (500, 1500):
        folder = tmp_path / f"checkpoint-{steps}"
        folder.mkdir()
        save_tensors(folder / "model-00001-of-00002.safetensors", {"a.b": torch.ones(2)}, {})
        save_tensors(
            folder / "model-00002-of-00002.safetensors", {"a.c": torch.full((3,), steps)}, {}
        )
        homes = {
            "a.b": "model-00001-of-00002.safetensors",
            "a.c": "model-00002-of-00002.safetensors",
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
        torch.save({"state": {}, "param_groups": []}, folder / "optimizer.bin")
    opened = open_checkpoints(tmp_path)
    assert opened.names == ("checkpoint-500", "checkpoint-1500")
    assert opened.read(1)["a.c"].tolist() == [1500] * 3


def test_optimizers_alone_are_refused(tmp_path: Path) -> None:
    only = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    (tmp_path / "checkpoint-5").mkdir()
    torch.save(only, tmp_path / "checkpoint-5/optimizer.bin")
    torch.save(only, tmp_path / "a.pt")
    torch.save({"optimizer": only, "step": 3}, tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        with pytest.raises(CheckpointError, match="the state of an optimizer, and no weights"):
            convert(tmp_path / name, tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds optimizer.bin, .* and no weights"):
        convert(tmp_path / "checkpoint-5", tmp_path / "out")


# ------------------------------------------------------------------------------- torch.distributed


def save_distributed(data: dict[str, Any], folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(data, checkpoint_id=folder)


def test_distributed_checkpoints_as_torch_writes_them(tmp_path: Path) -> None:
    net = nn.Linear(3, 2)
    net(torch.ones(1, 3)).sum().backward()
    optimizer = torch.optim.Adam(net.parameters())
    optimizer.step()
    expected = {"block.0.weight": net.weight.detach(), "block.0.bias": net.bias.detach()}
    data = {"model": expected, "optimizer": optimizer.state_dict()}
    twice = {"model": {k: 2 * v for k, v in expected.items()}, "optim": optimizer.state_dict()}
    save_distributed({"app": twice}, tmp_path / "run/step_6")  # as torch's own recipe does
    save_distributed({**data, "step": 7}, tmp_path / "run/step_7")
    convert(tmp_path / "run", tmp_path / "set", images_per_step=1, format="distcp")
    opened = open_checkpoints(tmp_path / "set")
    assert opened.nimg == [6, 7]
    for found, scale in zip(map(opened.read, (0, 1)), (2, 1), strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], scale * expected[k]) for k in expected)
    both = {"model": twice["model"], "ema": expected, "step": 8}
    save_distributed(both, tmp_path / "averaged/step_8")
    convert(tmp_path / "averaged", tmp_path / "both", weights="both")
    assert open_checkpoints(tmp_path / "both").tracks == ["raw", "ema"]
    (tmp_path / "run/step_7/__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated"):
        convert(tmp_path / "run", tmp_path / "other")


def test_lightnings_shards_count_the_steps_of_their_meta(tmp_path: Path) -> None:
    place = tmp_path / "epoch=0-step=200.ckpt"  # a folder, where FSDP saves shards
    save_distributed({"model": {"net.a.weight": torch.ones(2, 2)}}, place)
    settings = {"batch_size": 32, "accumulate_grad_batches": 2}
    torch.save({"global_step": 200, "hyper_parameters": settings}, place / "meta.pt")
    convert(place, tmp_path / "set")
    opened = open_checkpoints(tmp_path / "set")
    assert opened.nimg == [200 * 64]
    assert opened.read(0).keys() == {"a.weight"}


@pytest.mark.parametrize(
    ("begins", "fits"), [([0, 2], True), ([2, 0], True), ([0, 1], False), ([0, 3], False)]
)
def test_parts_must_cover_their_tensor(begins: list[int], fits: bool, tmp_path: Path) -> None:
    torch.save(torch.ones(2, 3), tmp_path / "a.pt")
    part: Any = read_data(tmp_path / "a.pt")
    for turned in (False, True):  # cut along the first axis, or along both
        parts: list[tuple[tuple[int, ...], Any]] = [((begin, 0), part) for begin in begins]
        shape: tuple[int, ...] = (4, 3)
        if turned:
            parts, shape = [((y, x), part) for y in begins for x in (0, 3)], (4, 6)
        if fits:
            _require_cover(tmp_path, "w", shape, parts)
        else:
            with pytest.raises(CheckpointError, match="do not cover a tensor of shape"):
                _require_cover(tmp_path, "w", shape, parts)


def test_a_distributed_checkpoint_of_an_optimizer_is_refused(tmp_path: Path) -> None:
    save_distributed({"optimizer": {"a": torch.ones(2)}}, tmp_path / "step_1")
    with pytest.raises(CheckpointError, match="state of an optimizer or none, and no weights"):
        convert(tmp_path / "step_1", tmp_path / "out")


@pytest.mark.parametrize("axis", [0, 1])
def test_tensors_in_pieces_are_put_together(tmp_path: Path, axis: int) -> None:
    whole = torch.arange(12.0).reshape(4, 3)
    parts: list[tuple[tuple[int, ...], Any]] = []
    begin = 0
    for i, part in enumerate(whole.tensor_split(2, dim=axis)):
        torch.save(part.contiguous(), tmp_path / f"{i}.pt")
        found: Any = read_data(tmp_path / f"{i}.pt")
        parts.append(((begin, 0) if axis == 0 else (0, begin), found))
        begin += part.shape[axis]
    pieced = PiecedRef((4, 3), parts[::-1])
    assert torch.equal(pieced.load(), whole)
    assert b"".join(pieced.pieces(8)) == whole.numpy().tobytes()


def test_pickled_shards_are_one_checkpoint(tmp_path: Path) -> None:
    folder, tensors = tmp_path / "run/checkpoint-5", state(5)
    folder.mkdir(parents=True)
    homes = {name: f"pytorch_model-{i}.bin" for i, name in enumerate(tensors)}
    for name, file in homes.items():
        torch.save({name: tensors[name]}, folder / file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": homes}))
    convert(tmp_path / "run", tmp_path / "set", images_per_step=1)
    opened = open_checkpoints(tmp_path / "set")
    assert opened.nimg == [5]
    assert all(torch.equal(opened.read(0)[name], tensors[name]) for name in tensors)
    index.write_text(json.dumps({"weight_map": {**homes, "ghost": next(iter(homes.values()))}}))
    with pytest.raises(CheckpointError, match="no shard holds 'ghost', as the index says"):
        convert(tmp_path / "run", tmp_path / "other")
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    with pytest.raises(CheckpointError, match="expected names of .bin beside it"):
        convert(tmp_path / "run", tmp_path / "other")


@pytest.mark.parametrize(
    ("content", "part", "message"),
    [
        ({"state_dict": {}, "epoch": 1, "global_step": 2}, None, "holds no tensors of a network"),
        ({"unet.a": torch.ones(1)}, "vae", "no tensors whose names begin with vae."),
        ({"G": state(), "D": state(1)}, None, "several networks, G, D; --part NAME takes one"),
        ({"opt": {"state": {}}}, None, "the state of an optimizer, and no weights"),
    ],
)
def test_files_without_the_weights_that_are_meant(
    content: dict[str, Any], part: str | None, message: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "a.ckpt", tmp_path / "out", part=part)


# ----------------------------------------------------------------------------------------- adapters


def write_adapter(folder: Path, rank: int, seed: int, **settings: Any) -> State:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    factors = {
        "base_model.model.mid.q.lora_A.weight": torch.randn(rank, 6, generator=generator),
        "base_model.model.mid.q.lora_B.weight": torch.randn(5, rank, generator=generator),
    }
    save_tensors(folder / "adapter_model.safetensors", factors, {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return factors


def test_adapters_as_factors_and_as_products(tmp_path: Path) -> None:
    factors = [write_adapter(tmp_path / f"run/checkpoint-{i}", 2, i) for i in (1, 2)]
    said = heard(tmp_path / "run", tmp_path / "factors")
    assert "its factors, averaged each by itself" in said
    opened = open_checkpoints(tmp_path / "factors")
    assert all(torch.equal(opened.read(0)[name], factors[0][name]) for name in factors[0])
    assert "its products" in heard(tmp_path / "run", tmp_path / "products", adapters="products")
    opened = open_checkpoints(tmp_path / "products")
    assert list(opened.tensors) == ["mid.q.weight"]
    for i, (down, up) in enumerate(each.values() for each in factors):
        torch.testing.assert_close(opened.read(i)["mid.q.weight"], 8 / 2 * up @ down)


def test_the_scale_of_products_is_the_adapters_own(tmp_path: Path) -> None:
    settings = {"use_rslora": True, "fan_in_fan_out": True, "alpha_pattern": {"q": 3}}
    down, up = write_adapter(tmp_path / "checkpoint-1", 4, 0, **settings).values()
    convert(tmp_path / "checkpoint-1", tmp_path / "set", adapters="products")
    found = open_checkpoints(tmp_path / "set").read(0)["mid.q.weight"]
    torch.testing.assert_close(found, (3 / 2 * up @ down).T)


def test_products_of_other_ranks_and_scales_are_merged(tmp_path: Path) -> None:
    alike: list[dict[str, Any]] = [{}, {"lora_alpha": 16}, {"lora_alpha": 16, "use_rslora": True}]
    scales, made = (8 / 2, 16 / 4, 16 / 16**0.5), []
    for i, (rank, settings) in enumerate(zip((2, 4, 16), alike, strict=True)):
        down, up = write_adapter(tmp_path / f"run/step_{i}", rank, i, **settings).values()
        made.append(scales[i] * up @ down)
    convert(tmp_path / "run", tmp_path / "set", adapters="products")
    merged = merge(open_checkpoints(tmp_path / "set"), [0.5, 0.75, -0.25])["mid.q.weight"]
    # Of float32: three products of at most 16 terms, and a sum of three.
    torch.testing.assert_close(merged, 0.5 * made[0] + 0.75 * made[1] - 0.25 * made[2])


@pytest.mark.parametrize(
    ("settings", "scale"),  # of rank 4
    [
        ({}, 8 / 4),
        ({"lora_alpha": 4, "alpha_pattern": {"^q$": 1}}, 4 / 4),  # of another layer: not mid.q
        ({"alpha_pattern": {"^mid\\.q$": 1, "q": 3}}, 1 / 4),  # the first that means it
        ({"lora_alpha": 0}, "expected a number other than 0 as lora_alpha of mid.q"),
        ({"alpha_pattern": {"q": 0}}, "expected a number other than 0 as lora_alpha of mid.q"),
        (
            {"alpha_pattern": {".*q": 1}},
            r"expected names of layers in alpha_pattern, found '\.\*q'",
        ),
        ({"r": 8}, "the factors of mid.q have rank 4, expected 8 as adapter_config.json says"),
        ({"r": 0}, "expected its rank r, found 0"),
    ],
)
def test_alpha_and_rank_as_the_settings_say(
    settings: dict[str, Any], scale: float | str, tmp_path: Path
) -> None:
    down, up = write_adapter(tmp_path / "checkpoint-1", 4, 0, **settings).values()
    if isinstance(scale, str):
        with pytest.raises(CheckpointError, match=scale):
            convert(tmp_path / "checkpoint-1", tmp_path / "set", adapters="products")
        return
    convert(tmp_path / "checkpoint-1", tmp_path / "set", adapters="products")
    found = open_checkpoints(tmp_path / "set").read(0)["mid.q.weight"]
    torch.testing.assert_close(found, scale * up @ down)


def test_whole_weights_of_an_adapter_are_told_from_changes(tmp_path: Path) -> None:
    factors = write_adapter(tmp_path / "a", 2, 0, modules_to_save=["head"])
    held = {**factors, "base_model.model.head.weight": torch.ones(3)}
    held["base_model.model.first.base_layer.bias"] = torch.ones(4)
    save_tensors(tmp_path / "a/adapter_model.safetensors", held, {"format": "pt"})
    said = heard(tmp_path / "a", tmp_path / "set", adapters="products")
    assert "head.weight, first.bias: no changes but weights, which take the place" in said
    found = open_checkpoints(tmp_path / "set").read(0)
    assert torch.equal(found["head.weight"], torch.ones(3))
    assert torch.equal(found["first.bias"], torch.ones(4))
    with pytest.raises(CheckpointError, match="adapters; `mergerl convert` makes a set of them"):
        open_checkpoints(tmp_path / "a")


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", 2, 0)
    write_adapter(tmp_path / "b", 4, 0)
    write_adapter(tmp_path / "c", 2, 0, lora_alpha=16)
    write_adapter(tmp_path / "d", 2, 0, use_dora=True)
    write_adapter(tmp_path / "e", 2, 0, peft_type="IA3")
    with pytest.raises(
        IncompatibleCheckpointError, match=r"a is .* rank 2 and .*b one of rank 4.*--adapters prod"
    ):
        convert([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    with pytest.raises(
        IncompatibleCheckpointError, match=r"lora_alpha 16, expected 8 as in .*, or --adapters prod"
    ):
        convert([tmp_path / "a", tmp_path / "c"], tmp_path / "out")
    bases = [tmp_path / "x", tmp_path / "y"]
    for place in bases:
        write_adapter(place, 2, 0, base_model_name_or_path=f"org/{place.name}")
    for adapters in ("factors", "products"):
        with pytest.raises(IncompatibleCheckpointError, match=r"path org/y, .* org/x as in \S+$"):
            convert(bases, tmp_path / "out", adapters=adapters)
    with pytest.raises(CheckpointError, match="a DoRA, whose change is no product"):
        convert(tmp_path / "d", tmp_path / "out", adapters="products")
    with pytest.raises(CheckpointError, match="of the type LORA, found 'IA3'"):
        convert(tmp_path / "e", tmp_path / "out")
    (tmp_path / "a/adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="without adapter_model.safetensors or .bin"):
        convert(tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()
