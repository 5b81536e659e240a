"""Official checkpoints to safetensors: exact, resumable, with a manifest of what they are."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import merge_rl as mrl
from merge_rl.errors import (
    CheckpointError,
    ConfigError,
    IncompatibleCheckpointError,
    NonFiniteWeightsError,
    RunError,
)
from merge_rl.models.edm2 import EDM2, UNet
from merge_rl.models.edm2_layers import BlockConfig
from merge_rl.storage.checkpoints.catalogue import load_catalogue
from merge_rl.storage.checkpoints.manifest import MANIFEST_NAME, read_manifest
from merge_rl.storage.checkpoints.model_file import open_model_file
from merge_rl.storage.convert.edm2 import DEFAULTS, OPTIONS, edm2_config_from_shapes
from merge_rl.storage.convert.run import convert
from merge_rl.storage.files.safetensors_file import count_nonfinite
from merge_rl.storage.files.safetensors_header import CODES, TensorInfo, read_header
from tests.fixtures import TINY_MODEL
from tests.snapshots import write_sit, write_snapshot, write_training_state

KWARGS = {key: value for key, value in TINY_MODEL.items() if key != "model"}


def tiny_weights(
    seed: int, dtype: torch.dtype = torch.float16, **options: Any
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = EDM2(**{**KWARGS, **options}).state_dict()
    return {
        name: torch.randn(tensor.shape, generator=generator).to(dtype)
        for name, tensor in state.items()
    }


def snapshot(folder: Path, name: str, seed: int = 0, **options: Any) -> Path:
    """A tiny snapshot of random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    write_snapshot(path, tiny_weights(seed, **options), {**KWARGS, **options}, encoder="rgb")
    return path


def sit_weights(seed: int) -> dict[str, Tensor]:
    folder = Path(__file__).parents[2] / "golden/sit/tiny"
    weights = open_model_file(folder / "a.weights.safetensors").weights
    return {name: tensor + seed for name, tensor in weights.items()}


def require_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------------- official snapshots


@pytest.mark.parametrize(
    ("file", "network"),
    [
        ("tiny_snapshot", "cond"),
        ("tiny_snapshot_legacy_names", "cond"),
        ("tiny_snapshot_rgb_uncond", "uncond"),
    ],
)
def test_official_snapshots_are_converted_exactly(
    file: str, network: str, golden: Path, tmp_path: Path
) -> None:
    result = convert(golden / f"edm2/snapshot/{file}.pkl", tmp_path / "out")
    assert result.written == (tmp_path / f"out/{file}.safetensors",)
    assert (result.skipped, result.deleted) == ((), ())
    # The snapshot holds these weights rounded to float16, in the order of the official state dict.
    full = open_model_file(golden / f"edm2/tiny/{network}.weights.safetensors").weights
    opened = mrl.open_checkpoints(tmp_path / "out")
    require_equal(opened.read(0), {name: tensor.half() for name, tensor in full.items()})
    official = json.loads((golden / "edm2/tiny/configs.json").read_text())[network]["config"]
    config = opened.config
    assert config is not None
    assert {**official, "model": "edm2", "sigma_data": 0.5} == config
    assert all(check.ok and check.recorded for check in opened.verify())

    expected = open_model_file(golden / f"edm2/tiny/{network}.io.safetensors").weights
    model = mrl.load_model(result.written[0])
    assert list(model.state_dict()) == list(opened.tensors)
    with torch.no_grad():
        found = model(expected["x"], expected["sigma"], expected.get("class_labels"))
    worst = (found - expected["D_x_fp16_params_upcast"]).abs().max()
    assert worst < 2e-5 * expected["D_x_fp16_params_upcast"].abs().max()


def test_what_a_snapshot_says_is_kept(golden: Path, tmp_path: Path) -> None:
    folder = golden / "edm2/snapshot"
    convert(folder / "tiny_snapshot.pkl", tmp_path / "vae")
    metadata = mrl.open_checkpoints(tmp_path / "vae").metadata(0)
    encoder = json.loads(metadata["encoder"])
    assert (encoder["kind"], encoder["vae_name"]) == ("vae", "stabilityai/sd-vae-ft-mse")
    facts = json.loads((golden / "edm2/facts.json").read_text())["vae_encoder"]
    for key in ("scale", "bias"):
        assert encoder[key] == facts[f"{key}_float32"]
    assert json.loads(metadata["dataset"])["path"] == "datasets/tiny-sd.zip"
    assert read_manifest(tmp_path / "vae").defaults.autoencoder == "sd-vae-edm2"
    convert(folder / "tiny_snapshot_rgb_uncond.pkl", tmp_path / "rgb")
    assert json.loads(mrl.open_checkpoints(tmp_path / "rgb").metadata(0)["encoder"]) == {
        "kind": "rgb"
    }
    assert read_manifest(tmp_path / "rgb").defaults.autoencoder is None


def test_constructor_options_are_those_of_the_network() -> None:
    defaults: dict[str, Any] = {}
    for function in (EDM2, UNet, BlockConfig):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is not parameter.VAR_KEYWORD:
                defaults[name] = parameter.default
    assert set(OPTIONS) == defaults.keys() - {"patch_size"}  # which published files have not
    for name, value in DEFAULTS.items():
        assert (list(defaults[name]) if isinstance(value, list) else defaults[name]) == value


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_snapshots_of_any_protocol(protocol: int, tmp_path: Path) -> None:
    weights = tiny_weights(0)
    write_snapshot(tmp_path / "a.pkl", weights, KWARGS, protocol=protocol)
    convert(tmp_path / "a.pkl", tmp_path / "out")
    opened = mrl.open_checkpoints(tmp_path / "out")
    require_equal(opened.read(0), weights)
    assert list(opened.tensors) == list(weights)
    encoder = json.loads(opened.metadata(0)["encoder"])
    assert encoder["scale"] == pytest.approx([0.12, 0.11, 0.13, 0.15])


# ------------------------------------------------------------------------- names and manifest


def test_a_name_that_no_manifest_can_hold_is_refused_first(golden: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"a\xff.pkl")
    shutil.copy(golden / "edm2/snapshot/tiny_snapshot.pkl", odd)
    with pytest.raises(ConfigError, match="cannot be recorded, as its name holds bytes that are"):
        convert(odd, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [odd]


def test_a_folder_of_snapshots(tmp_path: Path) -> None:
    names = [
        f"network-snapshot-{kimg:07d}-{std}" for kimg in (0, 8388) for std in ("0.050", "0.100")
    ]
    for seed, name in enumerate(names):
        snapshot(tmp_path / "src", f"{name}.pkl", seed)
    (tmp_path / "src/notes.txt").write_text("not a checkpoint")
    result = convert(tmp_path / "src", tmp_path / "out", name="mine", licence="MIT", workers=2)
    assert [path.name for path in result.written] == [f"{name}.safetensors" for name in names]
    opened = mrl.open_checkpoints(tmp_path / "out")
    assert list(opened.names) == names
    assert opened.nimg == [0, 0, 8_388_608, 8_388_608]
    assert opened.ema_std == [0.05, 0.1, 0.05, 0.1]
    assert opened.tracks == ["ema-0.050", "ema-0.100"]
    assert opened.licence == "MIT"
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.name, manifest.licence) == ("mine", "MIT")
    assert [entry.source for entry in manifest.checkpoints] == [f"{name}.pkl" for name in names]
    for i, name in enumerate(names):
        path = tmp_path / f"out/{name}.safetensors"
        assert manifest.checkpoints[i].sha256 == sha256(path)
        require_equal(opened.read(i), tiny_weights(i))
        alone = open_model_file(path)
        assert alone.config == {"model": "edm2", **KWARGS}
    mrl.merge(opened, [0.25] * 4)


def test_published_files_have_their_licence(tmp_path: Path) -> None:
    known = load_catalogue().find("edm2-img512-xs")
    for name in known.file_names()[:2]:
        snapshot(tmp_path / "src", name)
    convert(tmp_path / "src", tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.name, manifest.licence) == ("edm2-img512-xs", "CC-BY-NC-SA-4.0")
    # One of the user's own joins them: what is known of the others is not said of it.
    mixed = [tmp_path / "src" / known.file_names()[0], snapshot(tmp_path / "own", "mine.pkl")]
    convert(mixed, tmp_path / "mixed")
    manifest = read_manifest(tmp_path / "mixed")
    assert (manifest.name, manifest.licence) == (None, None)
    assert [entry.licence for entry in manifest.checkpoints] == ["CC-BY-NC-SA-4.0", None]


def test_conversions_into_one_folder_add_up(tmp_path: Path) -> None:
    first = snapshot(tmp_path / "src", "network-snapshot-0000102-0.050.pkl", 1)
    second = snapshot(tmp_path / "src", "network-snapshot-0000204-0.050.pkl", 2)
    convert(first, tmp_path / "out", name="run", licence="MIT")
    result = convert([second], tmp_path / "out")
    assert len(result.written) == 1
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.name, manifest.licence, len(manifest.checkpoints)) == ("run", "MIT", 2)
    whole = tmp_path / "whole"
    convert(tmp_path / "src", whole, name="run", licence="MIT")
    assert (whole / MANIFEST_NAME).read_bytes() == (tmp_path / "out" / MANIFEST_NAME).read_bytes()


def test_a_folder_that_holds_a_catalogue_is_refused(tmp_path: Path) -> None:
    file = snapshot(tmp_path / "src", "network-snapshot-0000102-0.050.pkl", 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MANIFEST_NAME).write_text("sets: []\n")
    with pytest.raises(CheckpointError, match="a catalogue of known sets; choose another folder"):
        convert(file, tmp_path / "out")
    assert [item.name for item in (tmp_path / "out").iterdir()] == [MANIFEST_NAME]


def test_the_same_sources_make_the_same_bytes(tmp_path: Path) -> None:
    for seed in range(4):
        snapshot(tmp_path / "src", f"network-snapshot-{100 * seed:07d}-0.100.pkl", seed)
    for workers in (1, 4):
        convert(tmp_path / "src", tmp_path / f"out{workers}", workers=workers)
    contents = [
        {file.name: file.read_bytes() for file in (tmp_path / out).iterdir()}
        for out in ("out1", "out4")
    ]
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("names", "turns"),
    [
        # Images seen tell the order, whatever was there first; where names tell none, the command.
        (["net-0000102-0.050", "net-0000204-0.050"], [[1], [0]]),
        (["net-0000102-0.050", "net-0000204-0.050"], [[1], [0, 1]]),
        (["second", "first", "third"], [[2], [0, 1, 2]]),
        (["second", "first", "third"], [[2, 0], [1], [0, 1, 2]]),
    ],
)
def test_a_manifest_does_not_tell_what_came_first(
    names: list[str], turns: list[list[int]], tmp_path: Path
) -> None:
    files = [snapshot(tmp_path / "src", f"{name}.pkl", 1) for name in names]
    convert(files, tmp_path / "whole")
    for turn in turns:
        convert([files[i] for i in turn], tmp_path / "out")
    found = read_manifest(tmp_path / "out")
    assert [entry.source for entry in found.checkpoints] == [f"{name}.pkl" for name in names]
    assert found == read_manifest(tmp_path / "whole")


# --------------------------------------------------------------------------- training states


def test_training_states_hold_the_raw_network_and_its_emas(tmp_path: Path) -> None:
    states = {std: tiny_weights(seed, torch.float32) for seed, std in enumerate((0.05, 0.1))}
    net = tiny_weights(7, torch.float32)
    write_training_state(tmp_path / "training-state-0000102.pt", net, states, nimg=102_912)
    with pytest.raises(CheckpointError, match="do not tell how many heads"):
        convert(tmp_path / "training-state-0000102.pt", tmp_path / "out")
    # A snapshot in the folder says what the state does not.
    write_snapshot(tmp_path / "network-snapshot-0000204-0.050.pkl", net, KWARGS)
    stem = "training-state-0000102"
    both = [tmp_path / "network-snapshot-0000204-0.050.pkl", tmp_path / f"{stem}.pt"]
    result = convert(both, tmp_path / "out")
    # Of the folder of a training run, the snapshots are meant.
    alone = convert(tmp_path, tmp_path / "alone").written
    assert [path.name for path in alone] == ["network-snapshot-0000204-0.050.safetensors"]
    assert [path.relative_to(tmp_path / "out").as_posix() for path in result.written] == [
        "network-snapshot-0000204-0.050.safetensors",
        f"raw/{stem}.safetensors",
        f"ema-0.050/{stem}-0.050.safetensors",
        f"ema-0.100/{stem}-0.100.safetensors",
    ]
    opened = mrl.open_checkpoints(tmp_path / "out", track="ema-0.100")
    assert (opened.nimg, opened.ema_std) == ([102_912], [0.1])  # the exact count of the state
    require_equal(opened.read(0), states[0.1])
    raw = mrl.open_checkpoints(tmp_path / "out", track="raw")
    require_equal(raw.read(0), net)
    assert raw.ema_std == [None]
    assert raw.config == {"model": "edm2", **KWARGS}
    for weights, tracks in (("model", ["raw"]), ("ema", ["ema-0.050", "ema-0.100"])):
        other = tmp_path / weights
        shutil.copytree(tmp_path / "out", other)
        kept = convert(tmp_path / f"{stem}.pt", other, weights=weights).skipped
        assert [path.parent.name for path in kept] == tracks


def test_the_shapes_of_a_training_state_say_most(golden: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "model_channels": 64,
        "channels_per_head": 64,
        "attn_resolutions": [8],
    }
    weights = tiny_weights(0, **options)
    ema = {name: tensor + 1 for name, tensor in weights.items()}
    write_training_state(tmp_path / "training-state-0000100.pt", weights, {0.05: ema}, None)
    heard: list[Mapping[str, Any]] = []

    class Ear:
        def phase(self, name: str, total: int) -> None: ...
        def advance(self, count: int) -> None: ...
        def event(self, event: Mapping[str, Any]) -> None:
            heard.append(event)

    convert(tmp_path / "training-state-0000100.pt", tmp_path / "out", tracker=Ear())
    assert "attention heads of 64 channels" in heard[0]["text"]
    opened = mrl.open_checkpoints(tmp_path / "out")
    assert opened.nimg == [100_352, 100_352]
    network = mrl.load_model(opened.paths[0])
    require_equal(network.state_dict(), {name: t.float() for name, t in weights.items()})


@pytest.mark.parametrize("size", ["xxs_img512", "xs_img512", "xxl_img512", "s_img64", "xl_img64"])
def test_official_networks_are_known_by_their_shapes(size: str, golden: Path) -> None:
    rows = json.loads((golden / f"edm2/state_dict_{size}.json").read_text())
    config = edm2_config_from_shapes({name: tuple(shape) for name, shape, *_ in rows})
    name, dataset = size.split("_")
    presets = json.loads((golden / "edm2/presets.json").read_text())
    kwargs = presets["presets"][f"edm2-{dataset}-{name}"]["cond"]["kwargs"]
    defaults = presets["defaults"]
    expected = {**defaults["precond"], **defaults["unet"], **defaults["block"], **kwargs}
    assert {key: expected[key] for key in config if key != "model"} == {
        key: value for key, value in config.items() if key != "model"
    }
    with torch.device("meta"):
        state = mrl.build_model(config).state_dict()
    assert [[key, list(t.shape)] for key, t in state.items()] == [row[:2] for row in rows]


# ----------------------------------------------------------------------------------------- SiT


def test_released_sit_weights(tmp_path: Path, golden: Path) -> None:
    weights = sit_weights(0)
    torch.save(weights, tmp_path / "SiT-tiny.pt")
    convert(tmp_path / "SiT-tiny.pt", tmp_path / "out", num_heads=4)
    opened = mrl.open_checkpoints(tmp_path / "out")
    require_equal(opened.read(0), weights)
    assert (opened.nimg, opened.ema_std, opened.tracks) == ([None], [None], [])
    assert opened.config is not None
    assert (opened.config["model"], opened.config["learn_sigma"]) == ("sit", True)
    assert opened.defaults.autoencoder == "sd-vae-sit"
    expected = open_model_file(golden / "sit/tiny/a.io.safetensors").weights
    with torch.no_grad():
        model = mrl.load_model(opened.paths[0])
        found = model(expected["x"], expected["t"], expected["y"])
    torch.testing.assert_close(found, expected["output"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("weights", "files"),
    [
        ("auto", ["ema/0050000"]),
        ("ema", ["ema/0050000"]),
        ("model", ["raw/0050000"]),
        ("both", ["raw/0050000", "ema/0050000"]),
    ],
)
def test_sit_training_checkpoints(weights: str, files: list[str], tmp_path: Path) -> None:
    model, ema = sit_weights(1), sit_weights(2)
    write_sit(
        tmp_path / "0050000.pt", model, ema, global_batch_size=64, num_classes=10, prediction="v"
    )
    result = convert(tmp_path / "0050000.pt", tmp_path / "out", weights=weights, num_heads=4)
    assert result.written == tuple(tmp_path / f"out/{name}.safetensors" for name in files)
    for name in files:
        opened = mrl.open_checkpoints(tmp_path / "out", track=name.partition("/")[0])
        require_equal(opened.read(0), model if name.startswith("raw") else ema)
        assert opened.nimg == [50_000 * 64]
        assert json.loads(opened.metadata(0)["training"])["global_batch_size"] == 64


def test_sit_checkpoints_of_several_devices_and_without_ema(tmp_path: Path) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in sit_weights(1).items()}
    write_sit(tmp_path / "0000100.pt", wrapped, None, path_type="Linear")
    convert(tmp_path / "0000100.pt", tmp_path / "out", num_heads=4)
    opened = mrl.open_checkpoints(tmp_path / "out")
    require_equal(opened.read(0), sit_weights(1))
    assert (opened.tracks, opened.nimg) == (["raw"], [25_600])  # 256 images a step by default
    with pytest.raises(CheckpointError, match="holds no 'ema', only model"):
        convert(tmp_path / "0000100.pt", tmp_path / "other", weights="ema", num_heads=4)
    with pytest.raises(CheckpointError, match="0000100.pt: .*pass num_heads"):
        convert(tmp_path / "0000100.pt", tmp_path / "other")


def test_safetensors_join_a_set(tmp_path: Path) -> None:
    convert(snapshot(tmp_path / "src", "network-snapshot-0000102-0.050.pkl"), tmp_path / "first")
    file = tmp_path / "first/network-snapshot-0000102-0.050.safetensors"
    convert(file, tmp_path / "second")
    second = mrl.open_checkpoints(tmp_path / "second")
    require_equal(second.read(0), tiny_weights(0))
    assert (second.nimg, second.config) == (
        [102_400],
        mrl.open_checkpoints(tmp_path / "first").config,
    )
    # In its place already: it is read, hashed and listed, not written again.
    (tmp_path / "first" / MANIFEST_NAME).unlink()
    before = sha256(file)
    result = convert(tmp_path / "first", tmp_path / "first", delete_source=True)
    assert (result.written, result.skipped, result.deleted) == ((), (file,), ())
    assert read_manifest(tmp_path / "first").checkpoints[0].sha256 == before == sha256(file)


# ------------------------------------------------------------------------- resuming, deleting


def test_sound_outputs_are_kept(tmp_path: Path) -> None:
    sources = [snapshot(tmp_path / "src", f"network-snapshot-{i:07d}-0.050.pkl", i) for i in (1, 2)]
    out = tmp_path / "out"
    first = convert(sources, out)
    stamps = [path.stat().st_mtime_ns for path in first.written]
    again = convert(sources, out)
    assert (again.written, again.skipped) == ((), first.written)
    assert [path.stat().st_mtime_ns for path in first.written] == stamps
    # One bit of a tensor, then the header, then the file itself: each is made again.
    hashes = [sha256(path) for path in first.written]
    for damage in ("bit", "header", "missing", "unlisted"):
        path = first.written[0]
        data = bytearray(path.read_bytes())
        data[-1 if damage == "bit" else 3] ^= 1
        if damage == "missing":
            path.unlink()
        elif damage == "unlisted":  # as an interruption just after the last write leaves it
            (out / MANIFEST_NAME).unlink()
        else:
            path.write_bytes(data)
        result = convert(sources, out)
        assert path in result.written
        assert [sha256(path) for path in first.written] == hashes
        assert all(check.ok for check in mrl.open_checkpoints(out).verify())


def test_outputs_of_other_sources_are_not_overwritten(tmp_path: Path) -> None:
    name = "network-snapshot-0000102-0.050.pkl"
    ours, other = snapshot(tmp_path / "a", name, 1), tmp_path / "b" / name
    # Of the same size, which two pickles need not be: torch writes addresses of memory in digits.
    data = bytearray(ours.read_bytes())
    data[data.index(tiny_weights(1)["unet.out_conv.weight"].numpy().tobytes())] ^= 1
    other.parent.mkdir()
    other.write_bytes(data)
    convert(ours, tmp_path / "out")
    before = sha256(tmp_path / "out/network-snapshot-0000102-0.050.safetensors")
    with pytest.raises(CheckpointError, match="exists already and was not made from this"):
        convert(other, tmp_path / "out")
    assert sha256(tmp_path / "out/network-snapshot-0000102-0.050.safetensors") == before
    foreign = tmp_path / "new/network-snapshot-0000102-0.050.safetensors"
    foreign.parent.mkdir()
    foreign.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="exists already"):
        convert(ours, tmp_path / "new")
    assert foreign.read_bytes() == b"mine"
    with pytest.raises(CheckpointError, match="would both be written to"):
        convert([ours, other], tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_sources_are_deleted_after_verification_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [snapshot(tmp_path / "src", f"network-snapshot-{i:07d}-0.050.pkl", i) for i in (1, 2)]
    with monkeypatch.context() as patched:
        patched.setattr("merge_rl.storage.convert.run.sha256_file", lambda path: "0" * 64)
        with pytest.raises(CheckpointError, match="SHA-256 is 0000"):
            convert(sources, tmp_path / "bad", delete_source=True)
    assert all(path.exists() for path in sources)
    convert(sources[0], tmp_path / "out")
    result = convert(sources, tmp_path / "out", delete_source=True)
    assert result.deleted == tuple(sources)
    assert len(result.skipped) == len(result.written) == 1
    assert not any(path.exists() for path in sources)
    assert all(check.ok for check in mrl.open_checkpoints(tmp_path / "out").verify())


# ------------------------------------------------------------------------------------ refusals


def test_networks_are_not_mixed(tmp_path: Path) -> None:
    first = snapshot(tmp_path / "src", "network-snapshot-0000001-0.050.pkl")
    wider = snapshot(tmp_path / "src", "network-snapshot-0000002-0.050.pkl", model_channels=16)
    head = snapshot(tmp_path / "src", "network-snapshot-0000003-0.050.pkl", sigma_data=0.7)
    full = tmp_path / "src/network-snapshot-0000004-0.050.pkl"
    write_snapshot(full, tiny_weights(0, torch.float32), KWARGS)
    torch.save(sit_weights(0), tmp_path / "src/sit.pt")
    cases = [
        (wider, r"not the same network as .*float16 \[16\] here and float16 \[8\]"),
        (head, "a network with sigma_data 0.7, expected 0.5"),
        (full, "float32 .* here and float16 .* there"),
        (tmp_path / "src/sit.pt", "not the same network"),
    ]
    convert(snapshot(tmp_path / "src", "a.pkl", sigma_data=0.5), tmp_path / "out")
    for other, message in cases:
        for sources, out in (([first, other], tmp_path / "new"), ([other], tmp_path / "out")):
            with pytest.raises(IncompatibleCheckpointError, match=message):
                convert(sources, out, num_heads=4)
        assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["a.safetensors"]


def test_weights_that_are_not_finite_leave_nothing(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        weights = tiny_weights(0)
        weights["unet.out_conv.weight"][0, 3, 1, 2] = value
        write_snapshot(tmp_path / "a.pkl", weights, KWARGS)
        with pytest.raises(NonFiniteWeightsError, match="a.pkl: tensor unet.out_conv.weight holds"):
            convert(tmp_path / "a.pkl", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_one_bad_file_does_not_cost_the_others(tmp_path: Path) -> None:
    weights = tiny_weights(2)
    weights["unet.out_gain"] = torch.tensor(float("nan"), dtype=torch.float16)
    snapshot(tmp_path / "src", "network-snapshot-0000001-0.050.pkl", 1)
    write_snapshot(tmp_path / "src/network-snapshot-0000002-0.050.pkl", weights, KWARGS)
    with pytest.raises(NonFiniteWeightsError):
        convert(tmp_path / "src", tmp_path / "out", workers=1)
    opened = mrl.open_checkpoints(tmp_path / "out")
    assert (opened.nimg, [check.ok for check in opened.verify()]) == ([1024], [True])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"ema": 3},
            "EDM2 snapshot or training state, or tensors by name, found",
        ),
        ([1, 2], "found 'list'"),
        ({}, r"keys \(none\)"),
        (
            {"a": torch.zeros(2), "b": torch.zeros(3)},
            "network, found 'a', no name of a",
        ),
        ({"pos_embed": torch.zeros(2), "final_layer.linear.weight": torch.zeros(3)}, "not a SiT"),
        ({"model": {"a": 1}}, "by name, found a mapping with the keys model"),
        ({"model": {}}, "by name, found a mapping with the keys model"),
        ({"a b": torch.zeros(2)}, "expected names of tensors, found a b"),
        ({"\n": torch.zeros(2)}, r"expected names of tensors, found \?"),
        ({"net": {"a": torch.zeros(1)}, "ema": {"stds": [0.1], "emas": []}}, "found 0 EMAs for 1"),
        ({"net": {"a": torch.zeros(1)}, "ema": {"stds": 3, "emas": []}}, "a list of EMA widths"),
        ({"net": {"a": torch.zeros(1)}, "ema": {"stds": [2.0], "emas": [{}]}}, "below 0.289"),
    ],
)
def test_other_content_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "a.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_snapshots_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"label_dim": 11}, r"1 differ, first 'unet.emb_label.weight': .* \[8, 10\], .* \[8, 11\]"),
        ({"img_resolution": 16}, r"first 'unet.enc.16x16_conv.weight': found missing"),
        ({"model_channels": 16}, r"'unet.emb_fourier.freqs': found float16 \[8\], .* \[16\]"),
        ({"num_blocks": 2**20}, "expected num_blocks as a whole number from 0 to 200, got 1048576"),
        ({"num_blocks": 200}, "tensors, but its config describes a network of 200 parts"),
        ({"evil": 1}, "no option evil"),
        ({"dropout": float("nan")}, "option dropout is 'float'"),
        ({"img_resolution": 2**40}, "option img_resolution is a whole number"),
        ({"channel_mult": [[1]]}, "option channel_mult is 'list'"),
        ({"use_fp16": 1}, "option use_fp16 is a whole number"),
    ]
    for change, message in cases:
        write_snapshot(tmp_path / "a.pkl", tiny_weights(0), {**KWARGS, **change})
        with pytest.raises(CheckpointError, match=message):
            convert(tmp_path / "a.pkl", tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds an EMA, no raw weights"):
        convert(snapshot(tmp_path, "b.pkl"), tmp_path / "out", weights="model")


@pytest.mark.parametrize(
    ("written", "instead", "found"),
    [(b"K\x06", b"K\x07", "version 7 of its"), (b"version", b"Version", "version nothing of its")],
)
def test_records_of_another_version_are_refused(
    written: bytes, instead: bytes, found: str, tmp_path: Path
) -> None:
    path = snapshot(tmp_path, "a.pkl")
    mark = b"\x8c\x07version\x94K\x06"
    data = path.read_bytes()
    assert mark in data
    path.write_bytes(data.replace(mark, mark.replace(written, instead), 1))
    with pytest.raises(CheckpointError, match=f"a.pkl: .*{found} format, expected 6"):
        convert(path, tmp_path / "out")


def test_arguments_are_checked(tmp_path: Path) -> None:
    source = snapshot(tmp_path / "src", "a.pkl")
    with pytest.raises(
        ConfigError, match="unknown weights 'raw' \\(known: auto, both, ema, model\\)"
    ):
        convert(source, tmp_path / "out", weights="raw")
    with pytest.raises(ConfigError, match="expected workers >= 1, got 0"):
        convert(source, tmp_path / "out", workers=0)
    with pytest.raises(ConfigError, match="at least one file"):
        convert([], tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"missing\.pkl: no such file"):
        convert(tmp_path / "missing.pkl", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoints to convert"):
        convert(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(RunError, match="expected a folder to write to, found a file"):
        convert(source, source)
    (tmp_path / "known").mkdir()
    (tmp_path / "known" / MANIFEST_NAME).write_text("version: 1\nsets: []\n")
    with pytest.raises(CheckpointError, match="a catalogue of known sets"):
        convert(source, tmp_path / "known")
    hidden = snapshot(tmp_path / "src", ".hidden.pkl")
    with pytest.raises(CheckpointError, match="a hidden file's name"):
        convert(hidden, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------- memory


def test_memory_is_a_few_pieces_whatever_the_size(tmp_path: Path) -> None:
    options = {"model_channels": 384, "channels_per_head": 384}
    source = snapshot(tmp_path, "network-snapshot-0000001-0.050.pkl", **options)
    assert source.stat().st_size > 25e6
    convert(source, tmp_path / "warm")
    tracemalloc.start()
    try:
        convert(source, tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10e6
    header = read_header(tmp_path / "out/network-snapshot-0000001-0.050.safetensors")
    assert {info.dtype for info in header.tensors.values()} == {torch.float16}


@pytest.mark.parametrize(
    "code", [code for code in CODES if TensorInfo((), code).is_floating or code == "C64"]
)
def test_numbers_that_are_not_finite_are_counted_in_every_type(code: str) -> None:
    if code == "F8_E8M0" and not hasattr(torch, "float8_e8m0fnu"):
        pytest.skip("not a type of this PyTorch")
    dtype = TensorInfo((), code).dtype
    # All 16-bit patterns, in an order in which wider types see many of theirs.
    words = torch.arange(2**16, dtype=torch.int32)
    pattern = torch.cat([words, words.flip(0), words * 40503 % 2**16]).to(torch.int16)
    values = pattern.view(torch.uint8).view(dtype)
    wide = values if dtype.is_complex or dtype.itemsize > 1 else values.float()
    parts = torch.view_as_real(wide) if dtype.is_complex else wide
    expected = int((~torch.isfinite(parts)).sum())
    assert count_nonfinite(values.view(torch.uint8).numpy().tobytes(), code) == expected > 0
