"""What checkpoints of training programs hold and say of themselves, in whatever container."""

from __future__ import annotations

import argparse
import collections
import json
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import merge_rl as mrl
from merge_rl.core.network import rotations
from merge_rl.errors import CheckpointError, ConfigError, NonFiniteWeightsError
from merge_rl.registry import build_model
from merge_rl.storage.checkpoints.manifest import (
    CheckpointEntry,
    Manifest,
    read_manifest,
    write_manifest,
)
from merge_rl.storage.checkpoints.model_file import open_tensors, save_checkpoint
from merge_rl.storage.convert.run import convert
from merge_rl.workflows.assembly.networks import load_network, load_weights
from tests.fixtures import TINY_MODEL

SIT: dict[str, Any] = {
    "model": "sit", "input_size": 4, "patch_size": 2, "in_channels": 1, "hidden_size": 8,
    "depth": 2, "num_heads": 2, "num_classes": 10, "class_dropout_prob": 0.0, "learn_sigma": False,
}  # fmt: skip
State = dict[str, Tensor]


def state_of(config: Mapping[str, Any], seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in build_model(config).state_dict().items()
    }


class Ear:
    """Keeps what a conversion says."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def phase(self, name: str, total: int) -> None: ...
    def advance(self, count: int) -> None: ...
    def event(self, event: Mapping[str, Any]) -> None:
        self.heard.append(str(event["text"]))


def model_of(folder: Path) -> tuple[int, bool]:
    """(classes, whether there is a null class) of a converted set."""
    model = read_manifest(folder).model
    return model["num_classes"], model["class_dropout_prob"] > 0


# --------------------------------------------------------------------------------- containers


class Node:
    """Stands in for the classes of a library that is not installed."""

    def __init__(self, **state: Any) -> None:
        vars(self).update(state)


class EasyDict(dict[str, Any]):
    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        vars(self).update(values)


@contextmanager
def named(**classes: type) -> Iterator[None]:
    """Classes under the names of another library, while a file is written."""
    made = []
    for full, kind in classes.items():
        module, _, name = full.replace("__", ".").rpartition(".")
        parts = module.split(".")
        for package in (".".join(parts[: i + 1]) for i in range(len(parts))):
            if package not in sys.modules:
                sys.modules[package] = ModuleType(package)
                made.append(package)
        vars(sys.modules[module])[name] = kind
        kind.__module__, kind.__name__, kind.__qualname__ = module, name, name
    try:
        yield
    finally:
        for module in made:
            del sys.modules[module]


def write_omegaconf(settings: Mapping[str, Any], path: Path, data: dict[str, Any]) -> None:
    """As OmegaConf's objects are: nodes that know their parents."""
    mapping, leaf, facts = (type(name, (Node,), {}) for name in ("D", "A", "C"))

    def node(value: object, parent: object) -> object:
        made: Any = (mapping if isinstance(value, Mapping) else leaf)()
        made._metadata = facts(ref_type=Any, object_type=dict, flags={})
        made._parent = parent
        if isinstance(value, Mapping):
            made._content = {key: node(item, made) for key, item in value.items()}
        else:
            made._val = value
        return made

    with named(
        omegaconf__dictconfig__DictConfig=mapping,
        omegaconf__nodes__AnyNode=leaf,
        omegaconf__base__ContainerMetadata=facts,
    ):
        torch.save({**data, "args": node(settings, None)}, path)


def write_config_dict(settings: Mapping[str, Any], path: Path, data: dict[str, Any]) -> None:
    kind = type("ConfigDict", (Node,), {})
    with named(ml_collections__config_dict__config_dict__ConfigDict=kind):
        torch.save({**data, "config": kind(_fields=dict(settings), _locked=False)}, path)


def write_easydict(settings: Mapping[str, Any], path: Path, data: dict[str, Any]) -> None:
    with named(easydict__EasyDict=EasyDict):
        torch.save({**data, "cfg": EasyDict(settings)}, path)


def saved(key: str, make: Callable[[Mapping[str, Any]], object]) -> Callable[..., None]:
    return lambda settings, path, data: torch.save({**data, key: make(settings)}, path)


CONTAINERS: dict[str, Callable[..., None]] = {
    "dict": saved("args", dict),
    "Namespace": saved("args", lambda s: argparse.Namespace(**s)),
    "Namespace with paths": saved(
        "args", lambda s: argparse.Namespace(**s, out=Path("a/b"), at=PurePosixPath("/c"))
    ),
    "SimpleNamespace": saved("opts", lambda s: types.SimpleNamespace(**s)),
    "defaultdict": saved("hparams", lambda s: collections.defaultdict(list, s)),
    "text": saved("args", lambda s: {key: str(value) for key, value in s.items()}),
    "sections": saved("config", lambda s: {"data": {"sub": dict(s)}, "name": "x"}),
    "omegaconf": write_omegaconf,
    "omegaconf in sections": lambda s, path, data: write_omegaconf({"a": s}, path, data),
    "ml_collections": write_config_dict,
    "easydict": write_easydict,
}
CONTAINERS["SimpleNamespace"] = saved("options", lambda s: types.SimpleNamespace(**s))


@pytest.mark.parametrize("container", CONTAINERS)
def test_settings_are_read_from_any_container(container: str, tmp_path: Path) -> None:
    # Ten rows of labels: nine classes and the null class, which only the settings tell.
    ear, said = Ear(), {"num_classes": 9, "global_batch_size": 64, "num_heads": 4}
    settings = {**said, "path_type": "GVP"}
    CONTAINERS[container](settings, tmp_path / "0000100.pt", {"ema": state_of(SIT)})
    convert(tmp_path / "0000100.pt", tmp_path / "out", tracker=ear)
    assert model_of(tmp_path / "out") == (9, True)
    assert read_manifest(tmp_path / "out").model["num_heads"] == 4
    assert read_manifest(tmp_path / "out").defaults.sampler == {"path": "gvp"}
    opened = mrl.open_checkpoints(tmp_path / "out")
    assert opened.nimg == [100 * 64]
    assert "9" in json.loads(opened.metadata(0)["training"]).__repr__()
    assert not any("taken" in text or "takes" in text for text in ear.heard)


def test_repa_counts_its_steps_itself(tmp_path: Path) -> None:
    state = state_of(SIT, 1)
    held = {
        **state,
        "projectors.0.0.weight": torch.ones(3, 8),
        "projectors.0.0.bias": torch.ones(3),
    }
    args = argparse.Namespace(
        num_classes=9, batch_size=32, cfg_prob=0.2, num_heads=2, path_type="cosine", prediction="v"
    )
    data = {"model": held, "ema": held, "opt": {"state": {}}, "args": args, "steps": 500}
    torch.save(data, tmp_path / "0000400.pt")
    ear = Ear()
    convert(tmp_path / "0000400.pt", tmp_path / "out", tracker=ear)
    opened = mrl.open_checkpoints(tmp_path / "out")
    assert opened.nimg == [500 * 32]
    assert opened.read(0).keys() == state.keys()
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.model["model"], manifest.model["class_dropout_prob"]) == ("repa", 0.2)
    assert dict(manifest.defaults.sampler) == {"path": "gvp"}
    assert any("projectors.*" in text and "no sample" in text for text in ear.heard)


def test_early_repa_counts_blocks_after_the_projectors_anew(tmp_path: Path) -> None:
    state = state_of(SIT, 1)
    late = {k.replace("blocks.1.", "decoder_blocks.0."): v for k, v in state.items()}
    torch.save(late, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "out", num_heads=2)
    opened = mrl.open_checkpoints(tmp_path / "out")
    assert read_manifest(tmp_path / "out").model["model"] == "repa"
    assert all(torch.equal(opened.read(0)[name], state[name]) for name in state)


TWICE = {**SIT, "learn_sigma": True}


@pytest.mark.parametrize(
    ("config", "settings", "name", "hints", "family"),
    [
        (TWICE, {"model": "DiT-S/2"}, "0000100", {}, "dit"),
        (TWICE, {"model": "SiT-S/2", "path_type": "Linear"}, "0000100", {}, "sit"),
        (TWICE, {"a": {"path_type": "VP"}}, "0000100", {}, "sit"),
        (TWICE, {}, "DiT-XL-2-256x256", {}, "dit"),
        (TWICE, {}, "SiT-XL-2-256x256", {}, "sit"),
        (TWICE, {}, "a", {"family": "dit"}, "dit"),
        (TWICE, {"model": "DiT-S/2"}, "SiT", {"family": "sit"}, "sit"),
        (SIT, {"model": "SiT-S/2", "enc_type": "dinov2-vit-b"}, "0000100", {}, "repa"),
        (SIT, {}, "repa-last", {}, "repa"),
        (SIT, {}, "sit-last", {}, "sit"),
        (SIT, {"path_type": "Linear", "prediction": "velocity"}, "0000100", {}, "sit"),
        (SIT, {}, "position", {"family": "repa"}, "repa"),
    ],
)
def test_what_a_file_says_tells_families_of_equal_tensors_apart(
    config: Mapping[str, Any], settings: Any, name: str, hints: Any, family: str, tmp_path: Path
) -> None:
    state = state_of(config, 1)
    held = {"model": state, "ema": state, "args": settings} if settings else state
    torch.save(held, tmp_path / f"{name}.pt")
    convert(tmp_path / f"{name}.pt", tmp_path / "out", num_heads=2, **hints)
    assert read_manifest(tmp_path / "out").model["model"] == family


@pytest.mark.parametrize(
    ("config", "other", "apart"),
    [
        (TWICE, " and dit", "what they predict"),
        (SIT, ", repa and dit", "what they predict or which"),
    ],
)
def test_a_family_that_nothing_tells_is_asked_for(
    config: dict[str, Any], other: str, apart: str, tmp_path: Path
) -> None:
    # Settings that many programs have say nothing of it.
    torch.save({"ema": state_of(config, 1), "args": {"num_classes": 10}}, tmp_path / "a.pt")
    asked = rf"a\.pt: sit{other} have these tensors and differ in {apart}.*--family"
    with pytest.raises(CheckpointError, match=asked):
        convert(tmp_path / "a.pt", tmp_path / "out", num_heads=2)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="not the tensors of jit, but of sit or "):
        convert(tmp_path / "a.pt", tmp_path / "out", num_heads=2, family="jit")
    with pytest.raises(CheckpointError, match="unknown family of networks 'dti'; did you mean"):
        convert(tmp_path / "a.pt", tmp_path / "out", num_heads=2, family="dti")


def test_what_a_manifest_says_of_a_file_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "set/raw/a.safetensors"
    save_checkpoint(file, state_of(SIT, 1))
    facts: dict[str, Any] = {"nimg": 300, "ema_std": 0.05, "track": "narrow"}
    entry = CheckpointEntry(file="raw/a.safetensors", **facts)
    manifest = Manifest(model=SIT, checkpoints=(entry,), licence="CC-BY-NC-SA-4.0")
    write_manifest(tmp_path / "set/checkpoints_manifest.yaml", manifest)
    convert(file, tmp_path / "out")
    made = read_manifest(tmp_path / "out")
    assert made.licence == "CC-BY-NC-SA-4.0"
    assert {key: getattr(made.checkpoints[0], key) for key in facts} == facts


def test_a_model_folder_says_its_network(tmp_path: Path) -> None:
    state, config = state_of(SIT, 1), {**SIT, "model": "repa"}
    save_checkpoint(tmp_path / "made/model.safetensors", state)
    (tmp_path / "made/config.json").write_text(json.dumps(config))
    (written,) = convert(tmp_path / "made", tmp_path / "out").written
    made = read_manifest(tmp_path / "out").model
    assert {key: made[key] for key in config} == config
    found = open_tensors(written).weights
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("said", ["manifest", "config.json"])
def test_what_lies_beside_a_file_tells_its_network(said: str, tmp_path: Path) -> None:
    file, config = tmp_path / "set/a.safetensors", {**SIT, "model": "repa", "num_classes": 9}
    config["class_dropout_prob"] = 0.1  # ten rows of labels, of which neither shapes nor names say
    save_checkpoint(file, state_of(config, 1))
    if said == "manifest":
        entry = CheckpointEntry(file="a.safetensors")
        write_manifest(
            file.parent / "checkpoints_manifest.yaml", Manifest(model=config, checkpoints=(entry,))
        )
    else:
        (file.parent / "config.json").write_text(json.dumps(config))
    convert(file, tmp_path / "out")
    made = read_manifest(tmp_path / "out").model
    assert {key: made[key] for key in config} == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path_type": "Linear", "prediction": "score"}, "trained with prediction score"),
        ({"path_type": "Cubic"}, "trained on the path 'Cubic'; expected one of linear"),
    ],
)
def test_what_no_network_here_predicts_is_refused(
    settings: Any, message: str, tmp_path: Path
) -> None:
    torch.save({"model": state_of(TWICE, 1), "args": settings}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "a.pt", tmp_path / "out", num_heads=2)


JIT: dict[str, Any] = {
    "model": "jit", "input_size": 8, "patch_size": 4, "in_channels": 3, "hidden_size": 16,
    "depth": 12, "num_heads": 2, "num_classes": 10, "bottleneck_dim": 4, "in_context_len": 2,
    "in_context_start": 4, "noise_scale": 1.0, "mlp_ratio": 4.0,
}  # fmt: skip


def test_jit_has_two_averages(tmp_path: Path) -> None:
    raw = {f"net.{name}": t for name, t in state_of(JIT, 1).items()}
    first, second = ({k: v + i for k, v in raw.items()} for i in (1, 2))
    held = {"model": raw, "model_ema1": first, "model_ema2": second, "epoch": 3, "optimizer": {}}
    held["args"] = argparse.Namespace(model="JiT-B/16", batch_size=128, noise_scale=2.0)
    torch.save(held, tmp_path / "checkpoint-last.pth")
    convert(tmp_path / "checkpoint-last.pth", tmp_path / "one")
    opened = mrl.open_checkpoints(tmp_path / "one")
    assert opened.config == {**JIT, "noise_scale": 2.0}
    assert torch.equal(opened.read(0)["pos_embed"], first["net.pos_embed"])
    convert(tmp_path / "checkpoint-last.pth", tmp_path / "all", weights="both")
    assert mrl.open_checkpoints(tmp_path / "all").tracks == ["raw", "ema1", "ema2"]


def test_jits_rotations_are_left_out_where_they_are_its_own(tmp_path: Path) -> None:
    def told(**stored: Tensor) -> str:
        held = {f"feat_rope.{name}": tensor for name, tensor in stored.items()}
        torch.save({"model": state_of(JIT, 1) | held}, tmp_path / "a.pt")
        ear = Ear()
        convert(tmp_path / "a.pt", tmp_path / f"out-{len(stored)}-{others}", tracker=ear)
        return "\n".join(ear.heard)

    for others in (0, 2):
        cosines, sines = rotations(8, 2, others)
        said = told(freqs_cos=cosines.bfloat16(), freqs_sin=sines)
        assert "left out the tensors feat_rope.*, which no sample depends on" in said
    for wrong in ({"freqs_cos": sines}, {"freqs_sin": 2 * sines}, {"freqs_cos": cosines[:3]},
                  {"freqs_sin": sines[:, :4]}):  # fmt: skip
        with pytest.raises(CheckpointError, match="turns tokens by other angles than a JiT of 2 x"):
            told(**wrong)


@pytest.mark.parametrize(
    ("averages", "tracks"),
    [
        ({"ema": {0.999: 1, 0.9999: 2}}, ["ema-0.999", "ema-0.9999"]),
        ({"emas": {"0.999": {"model": 1, "decay": 0.999}, "1e-4": {"model": 2}}},
         ["ema-0.999", "ema-1e-4"]),
        ({"ema_model": [1, 2]}, ["ema-0", "ema-1"]),
        ({"ema_0.999": 1, "ema_0.9999": 2}, ["ema_0.999", "ema_0.9999"]),
    ],
)  # fmt: skip
def test_averages_of_several_decays_are_tracks(
    averages: dict[str, Any], tracks: list[str], tmp_path: Path
) -> None:
    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [filled(item) for item in value]
        return {"a.weight": torch.full((2, 2), value)} if isinstance(value, int) else value

    torch.save({"model": filled(0), **filled(averages), "step": 3}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "all", weights="both", images_per_step=2)
    opened = mrl.open_checkpoints(tmp_path / "all")
    assert opened.tracks == ["raw", *tracks]
    assert [float(opened.read(i)["a.weight"][0, 0]) for i in range(3)] == [0, 1, 2]
    assert opened.nimg == [6, 6, 6]
    convert(tmp_path / "a.pt", tmp_path / "one")
    assert mrl.open_checkpoints(tmp_path / "one").tracks == tracks[:1]


@pytest.mark.parametrize(
    ("settings", "hints", "expected", "assumed"),
    [
        ({}, {}, (10, False), "taken: 10 and no null class for a label table of 10 rows"),
        ({}, {"null_class": True}, (9, True), None),
        ({}, {"null_class": False}, (10, False), None),
        ({}, {"num_classes": 9}, (9, True), None),
        ({}, {"num_classes": 9, "null_class": True}, (9, True), None),
        ({"cfg_prob": 0.1}, {}, (9, True), None),
        ({"class_dropout_prob": 0}, {}, (10, False), None),
        ({"num_classes": 9.0}, {}, (9, True), None),
        ({"num_classes": True}, {}, (10, False), "taken: 10 and no null class"),
        ({"a": {"num_classes": 9}, "b": {"num_classes": 10}}, {}, (10, False), "taken: 10"),
        # Fine-tuned on other data than the settings say: the user's word counts more.
        ({"num_classes": 1000}, {"num_classes": 9}, (9, True), None),
        ({"num_classes": 9}, {"null_class": False}, (10, False), None),
    ],
)
def test_the_null_class(
    settings: dict[str, Any],
    hints: dict[str, Any],
    expected: tuple[int, bool],
    assumed: str | None,
    tmp_path: Path,
) -> None:
    ear, path = Ear(), tmp_path / "0000100.pt"
    torch.save(
        {"model": state_of(SIT), "args": {"num_heads": 2, "path_type": "linear", **settings}}, path
    )
    convert(path, tmp_path / "out", tracker=ear, **hints)
    assert model_of(tmp_path / "out") == expected
    told = [text for text in ear.heard if "number of classes" in text]
    assert len(told) == (assumed is not None)
    assert all(str(assumed) in text for text in told)
    assert sum("nimg takes 256 images a step" in text for text in ear.heard) == 1


def test_contradictions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"model": state_of(SIT), "args": {"num_classes": 12, "prediction": "v"}}, path)
    with pytest.raises(CheckpointError, match=r"10 \(no null class\) or 9 .*, got 12; --num"):
        convert(path, tmp_path / "out", num_heads=2)
    with pytest.raises(CheckpointError, match="10 classes and a null class need .* 11 rows, foun"):
        convert(path, tmp_path / "out", num_heads=2, num_classes=10, null_class=True)
    sound = tmp_path / "a.safetensors"
    save_checkpoint(sound, state_of(TINY_MODEL), {"config": TINY_MODEL})
    with pytest.raises(ConfigError, match="an EDM2 network says its classes itself"):
        convert(sound, tmp_path / "out", null_class=True)
    assert not (tmp_path / "out").exists()


def test_what_is_stated_counts_more_than_what_is_assumed(tmp_path: Path) -> None:
    bare, stated = tmp_path / "a.pt", tmp_path / "0000100.pt"
    torch.save(state_of(SIT, 1), bare)
    said = {"num_classes": 9, "num_heads": 2, "path_type": "Linear"}
    torch.save({"ema": state_of(SIT, 2), "args": said}, stated)
    ear = Ear()
    convert([bare, stated], tmp_path / "both", num_heads=2, family="sit", tracker=ear)
    assert model_of(tmp_path / "both") == (9, True)
    assert not any("number of classes" in text for text in ear.heard)
    convert(stated, tmp_path / "later")
    convert(bare, tmp_path / "later", num_heads=2, family="sit")
    assert model_of(tmp_path / "later") == (9, True)
    assert len(mrl.open_checkpoints(tmp_path / "later")) == 2


# ------------------------------------------------------------------------- wrapped, beside others


def wrapped(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


FORMS: dict[str, Callable[[State], dict[str, Any]]] = {
    "compiled": lambda s: wrapped(s, "_orig_mod."),
    "parallel": lambda s: wrapped(s, "module."),
    "averaged": lambda s: {"n_averaged": torch.tensor(7), **wrapped(s, "module.")},
    "net": lambda s: wrapped(s, "net."),
    "model": lambda s: wrapped(s, "model."),
    "parallel and compiled": lambda s: wrapped(s, "module._orig_mod."),
    "a state dict by name": lambda s: {"state_dict": wrapped(s, "model."), "epoch": 3},
}
BESIDE: dict[str, Callable[[State, State], dict[str, Any]]] = {
    "model_ema beside model": lambda raw, ema: {"model": raw, "model_ema": ema, "epoch": 1},
    "averaged model": lambda raw, ema: {
        "net": raw, "ema": {"n_averaged": torch.tensor(7), **wrapped(ema, "module.")}
    },
    "one flat mapping": lambda raw, ema: wrapped(raw, "model.") | wrapped(ema, "model_ema."),
    "within a state dict": lambda raw, ema: {
        "state_dict": wrapped(raw, "model.") | wrapped(ema, "model_ema."), "global_step": 100
    },
    "shadow parameters by name": lambda raw, ema: {
        "model": raw, "ema": {"decay": 0.999, "shadow_params": wrapped(ema, "module.")}
    },
    "names without dots, of what is trained": lambda raw, ema: {
        "state_dict": wrapped(raw, "model.")
        | {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in ema.items()
           if name != "x_embedder.proj.bias"}
        | {"model_ema.decay": torch.tensor(0.99)}, "global_step": 100
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize("config", [TINY_MODEL, SIT], ids=["edm2", "sit"])
def test_wrapped_networks_are_converted(
    config: dict[str, Any], ending: str, form: str, tmp_path: Path
) -> None:
    state = state_of(config)
    content, path = FORMS[form](state), tmp_path / f"src/a{ending}"
    path.parent.mkdir()
    if ending == ".pt":
        torch.save(content, path)
    else:
        flat = content.get("state_dict", content)
        save_checkpoint(path, flat, {"config": config})
    if config is TINY_MODEL:  # whose attention's heads are not known from shapes
        sound = tmp_path / "sound.safetensors"
        save_checkpoint(sound, state_of(config, 1), {"config": config})
        convert(sound, tmp_path / "out")
    hints: Any = (
        {} if config is TINY_MODEL else {"num_heads": 2, "null_class": False, "family": "sit"}
    )
    (written,) = convert(path, tmp_path / "out", **hints).written
    found = load_network(written).state_dict()
    assert list(found) == list(state)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("prefix", ["denoiser.", "lightning.student."])
def test_a_known_network_under_an_unknown_name_is_found(prefix: str, tmp_path: Path) -> None:
    state, ear = state_of(SIT), Ear()
    hints: dict[str, Any] = {"num_heads": 2, "null_class": False, "family": "sit"}
    torch.save({"model": wrapped(state, prefix)}, tmp_path / "a.pt")
    (written,) = convert(tmp_path / "a.pt", tmp_path / "out", tracker=ear, **hints).written
    assert list(load_network(written).state_dict()) == list(state)
    assert any(text.endswith(f"by their names without {prefix!r}") for text in ear.heard)
    # Names of no network that is known are the user's own.
    torch.save({f"{prefix}a.weight": torch.ones(2), f"{prefix}b": torch.ones(1)}, tmp_path / "b.pt")
    (written,) = convert(tmp_path / "b.pt", tmp_path / "other").written
    assert list(open_tensors(written).weights) == [f"{prefix}a.weight", f"{prefix}b"]


def test_weights_that_are_not_finite_leave_no_folder_of_a_series(tmp_path: Path) -> None:
    state = state_of(SIT)
    state["pos_embed"] = state["pos_embed"] * float("nan")
    torch.save({"ema": state}, tmp_path / "a.pt")
    with pytest.raises(NonFiniteWeightsError, match="pos_embed"):
        convert(tmp_path / "a.pt", tmp_path / "out", num_heads=2, family="sit")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", BESIDE)
def test_of_raw_weights_and_their_average_the_average_is_taken(form: str, tmp_path: Path) -> None:
    raw, ema, path = state_of(SIT, 1), state_of(SIT, 2), tmp_path / "0000100.pt"
    torch.save(BESIDE[form](raw, ema), path)
    expected = {"auto": [ema], "ema": [ema], "model": [raw], "both": [raw, ema]}
    for weights, states in expected.items():
        ear = Ear()
        out = tmp_path / weights
        result = convert(path, out, weights=weights, num_heads=2, family="sit", tracker=ear)
        assert len(result.written) == len(states)
        for file, state in zip(result.written, states, strict=True):
            assert torch.equal(load_network(file).state_dict()["pos_embed"], state["pos_embed"])
            assert file.parent.name == ("ema" if state is ema else "raw") or "flat" in form
        left = [text for text in ear.heard if "the file holds beside it" in text]
        assert len(left) == (weights != "both")


def test_what_lies_beside_is_named_and_steps_may_be_a_tensor(tmp_path: Path) -> None:
    raw, ema, ear = state_of(SIT, 1), state_of(SIT, 2), Ear()
    flat = wrapped(ema, "ema_model.") | wrapped(raw, "online_model.") | {"initted": torch.ones(1)}
    torch.save(flat, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "out", num_heads=2, family="sit", tracker=ear)
    assert any(text.endswith("holds beside it: online_model, initted") for text in ear.heard)
    for steps in (torch.tensor(500), torch.tensor([500], dtype=torch.int32)):
        torch.save({"ema": ema, "steps": steps, "args": {"batch_size": 3}}, tmp_path / "last.pt")
        out = tmp_path / f"of {steps.ndim}"
        convert(tmp_path / "last.pt", out, num_heads=2, family="sit")
        assert mrl.open_checkpoints(out).nimg == [500 * 3]


def test_several_networks_are_not_guessed_among(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"model": state_of(SIT, 1), "net": state_of(SIT, 2)}, path)
    with pytest.raises(CheckpointError, match="a.pt: holds several networks, model, net; --part"):
        convert(path, tmp_path / "out")
    with pytest.raises(CheckpointError, match="expected the state dict of one network, found mode"):
        load_weights(str(path))


def test_wrapped_files_are_not_listed_in_their_place(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, wrapped(state_of(SIT), "module."), {"config": SIT})
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="to get other names; convert it into another folder"):
        convert(path, tmp_path, num_heads=2)
    assert path.read_bytes() == before


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_weights_of_extractors_and_decoders(form: str, ending: str, tmp_path: Path) -> None:
    state = {"conv.weight": torch.ones(2, 3), "conv.bias": torch.zeros(2), "norm.x": torch.ones(4)}
    state |= {f"layer{i}.weight": torch.full((2,), float(i)) for i in range(4)}
    content, path = FORMS[form](state), tmp_path / f"a{ending}"
    flat = content.get("state_dict", content)
    torch.save(content, path) if ending == ".pth" else save_checkpoint(path, flat)
    said: list[str] = []
    found = load_weights(str(path), said.append).tensors
    assert list(found) == list(state)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    extra = {"averaged": "n_averaged", "a state dict by name": "epoch"}.get(form)
    if ending == ".safetensors" and extra == "epoch":
        extra = None
    assert [extra in text for text in said if extra] == ([True] if extra else [])
    # The user's own module gets the names that its file has.
    if content is flat or ending == ".safetensors":
        assert set(load_weights(str(path), as_stored=True).tensors) == set(flat)
