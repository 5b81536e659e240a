"""Checkpoints as programs of training write them: by their names, beside one another, in words."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_rl.errors import CheckpointError, ConfigError
from merge_rl.storage.checkpoints import open_checkpoints, read_manifest
from merge_rl.storage.convert import convert
from merge_rl.storage.files.atomic import save_tensors
from tests.storage.convert.test_states import JIT, SIT, TWICE, Ear, state_of

State = dict[str, Tensor]
OPTIMIZER: dict[str, Any] = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}


def net(value: float) -> State:
    """A network of no family."""
    return {"enc.weight": torch.full((2, 3), value / 1), "enc.bias": torch.full((2,), value / 1)}


def read(folder: Path) -> dict[str, tuple[str | None, int | None, float]]:
    """Name -> (track, nimg, the value that its tensors have)."""
    opened = open_checkpoints(folder)
    return {
        name: (entry.track, entry.nimg, float(next(iter(opened.read(i).values())).flatten()[0]))
        for i, (name, entry) in enumerate(zip(opened.names, opened.entries, strict=True))
    }


# ------------------------------------------------------------------------ what lies side by side


def guided_diffusion(folder: Path) -> None:
    """`model`, `ema_RATE` and `opt` a time, as guided-diffusion and MDT write them."""
    folder.mkdir()
    for step in (10, 20):
        torch.save(net(step), folder / f"model{step:06d}.pt")
        torch.save(net(step + 0.5), folder / f"ema_0.9999_{step:06d}.pt")
        torch.save(net(step + 0.25), folder / f"ema_0.99_{step:06d}.pt")
        torch.save(OPTIMIZER, folder / f"opt{step:06d}.pt")


@pytest.mark.parametrize(
    ("weights", "kept"),
    [
        ("auto", {"ema-0.99"}),
        ("model", {"raw"}),
        ("ema", {"ema-0.99", "ema-0.9999"}),
        ("both", {"raw", "ema-0.99", "ema-0.9999"}),
    ],
)
def test_names_tell_averages_from_raw_weights(weights: str, kept: set[str], tmp_path: Path) -> None:
    guided_diffusion(tmp_path / "run")
    found = convert(tmp_path / "run", tmp_path / "out", weights=weights)
    parts = {"raw": 0, "ema-0.9999": 0.5, "ema-0.99": 0.25}
    expected = {track: [10 + parts[track], 20 + parts[track]] for track in kept}
    made: dict[str, list[float]] = {}
    for track, _, value in read(found.manifest.parent).values():
        made.setdefault(str(track), []).append(value)
    assert made == expected


def test_averages_alone_are_one_series(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for step in (10, 20):
        torch.save(net(step), tmp_path / f"run/ema_0.9999_{step:06d}.pt")
    convert(tmp_path / "run", tmp_path / "out")
    assert [track for track, _, _ in read(tmp_path / "out").values()] == [None, None]


@pytest.mark.parametrize(("weights", "value", "track"), [("auto", 7, "ema"), ("model", 5, "raw")])
def test_a_folder_a_step_with_an_average_beside(
    weights: str, value: float, track: str, tmp_path: Path
) -> None:
    """U-ViT's `STEP.ckpt/` with `nnet.pth`, `nnet_ema.pth` and what training goes on with."""
    for step in (50, 100):
        folder = tmp_path / f"ckpts/{step}.ckpt"
        folder.mkdir(parents=True)
        for name, held in (
            ("nnet", net(5 + step)), ("nnet_ema", net(7 + step)), ("step", step),
            ("optimizer", OPTIMIZER),
            ("lr_scheduler", {"last_epoch": step}),
        ):  # fmt: skip
            torch.save(held, folder / f"{name}.pth")
    convert(tmp_path / "ckpts", tmp_path / "out", weights=weights, images_per_step=4)
    expected = [(track, 4 * step, value + step) for step in (50, 100)]
    assert list(read(tmp_path / "out").values()) == expected


@pytest.mark.parametrize(("name", "beside"), [("ema", True), ("model_ema", False)])
def test_an_average_beside_the_model_of_a_step(name: str, beside: bool, tmp_path: Path) -> None:
    for step in (50, 100):
        folder = tmp_path / f"run/checkpoint-{step}"
        save_tensors(folder / "model.safetensors", net(5 + step))
        save_tensors(folder / f"{name}.safetensors", net(7 + step))
        if beside:
            torch.save(OPTIMIZER, folder / "optimizer.bin")
    convert(tmp_path / "run", tmp_path / "out", images_per_step=4)
    assert list(read(tmp_path / "out").values()) == [("ema", 200, 57), ("ema", 400, 107)]
    convert(tmp_path / "run", tmp_path / "raw", images_per_step=4, weights="model")
    assert list(read(tmp_path / "raw").values()) == [("raw", 200, 55), ("raw", 400, 105)]


def latent_diffusion(network: State, average: State) -> dict[str, Any]:
    """CompVis' checkpoint of Lightning: the average's names have no dots, a decoder lies beside."""
    raw = {f"model.diffusion_model.{name}": tensor for name, tensor in network.items()}
    inner = {f"diffusion_model.{name}".replace(".", ""): t for name, t in average.items()}
    state = {**raw, **{f"model_ema.{name}": tensor for name, tensor in inner.items()}}
    state |= {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(3)}
    state |= {"first_stage_model.weight": torch.ones(4), "betas": torch.rand(4)}
    return {"state_dict": state, "epoch": 1, "global_step": 30, "pytorch-lightning_version": "2"}


def test_an_average_whose_names_lost_their_dots(tmp_path: Path) -> None:
    torch.save(latent_diffusion(net(5), net(7)), tmp_path / "last.ckpt")
    convert(tmp_path / "last.ckpt", tmp_path / "out", weights="both", images_per_step=4)
    assert [value[::2] for value in read(tmp_path / "out").values()] == [("raw", 5), ("ema", 7)]
    opened = open_checkpoints(tmp_path / "out")
    assert list(opened.tensors) == ["diffusion_model.enc.weight", "diffusion_model.enc.bias"]
    assert opened.nimg == [120, 120]


def test_an_average_in_the_order_of_the_weights(tmp_path: Path) -> None:
    """torch-ema's state, as the programs of score_sde keep it."""
    shadow = {"decay": 0.999, "num_updates": 9, "shadow_params": list(net(7).values())}
    held = {"model": {f"module.{k}": t for k, t in net(5).items()}, "ema": shadow, "step": 30}
    torch.save({**held, "optimizer": OPTIMIZER}, tmp_path / "checkpoint_5.pth")
    convert(tmp_path / "checkpoint_5.pth", tmp_path / "out", images_per_step=4)
    assert read(tmp_path / "out") == {"checkpoint_5": ("ema", 120, 7)}
    held["ema"] = {**shadow, "shadow_params": list(net(7).values())[:1]}  # of another network
    torch.save(held, tmp_path / "checkpoint_5.pth")
    convert(tmp_path / "checkpoint_5.pth", tmp_path / "other", images_per_step=4)
    assert read(tmp_path / "other") == {"checkpoint_5": ("raw", 120, 5)}


# -------------------------------------------------------------------------- what settings say


def converted(
    held: Mapping[str, Any], folder: Path, name: str = "0000100.pt", **hints: Any
) -> dict[str, Any]:
    """The config that one file gives."""
    torch.save(dict(held), folder / name)
    convert(folder / name, folder / "out", **hints)
    return dict(read_manifest(folder / "out").model)


def test_a_flow_whose_network_is_called_dit(tmp_path: Path) -> None:
    """LightningDiT's config: a plain network of DiT's plan, and a velocity."""
    config = {
        "model": {"model_type": "DiT-XL/2"}, "data": {"num_classes": 10, "latent_norm": True},
        "transport": {"path_type": "Linear", "prediction": "velocity"},
        "train": {"global_batch_size": 32},
    }  # fmt: skip
    state = state_of({**TWICE, "in_channels": 4}, 1)
    found = converted({"model": state, "ema": state, "config": config}, tmp_path, num_heads=2)
    assert found["model"] == "sit"
    manifest = read_manifest(tmp_path / "out")
    assert manifest.checkpoints[0].nimg == 3200
    assert manifest.defaults.autoencoder is None  # of latents of another scale


@pytest.mark.parametrize("name", ["blocks.0.attn.q_norm.weight", "bn.running_mean"])
def test_descendants_of_a_family_are_taken_as_they_are(name: str, tmp_path: Path) -> None:
    """REPA-E normalises latents in the network, others normalise queries: none is a SiT."""
    settings = Namespace(model="SiT-XL/2", path_type="linear", prediction="v", enc_type="dinov2")
    state = {**state_of(SIT, 1), "projectors.0.weight": torch.ones(2), name: torch.ones(4)}
    ear = Ear()
    held = {"ema": state, "args": settings, "steps": 100}
    assert converted(held, tmp_path, tracker=ear) == {}
    assert name in open_checkpoints(tmp_path / "out").tensors
    assert any(f"(but for {name} they are a known one's)" in text for text in ear.heard)


def test_a_jit_is_as_its_settings_say(tmp_path: Path) -> None:
    args = Namespace(
        model="JiT-B/16", noise_scale="2.0", t_eps=0.05, batch_size=8, world_size=4, gpu=0
    )
    state = {f"net.{name}": tensor for name, tensor in state_of(JIT, 1).items()}
    held = {"model": state, "model_ema1": state, "args": args, "epoch": 3, "steps": 10}
    assert converted(held, tmp_path, "checkpoint-3.pth")["noise_scale"] == 2
    assert read_manifest(tmp_path / "out").checkpoints[0].nimg == 10 * 8 * 4
    args.t_eps = 0.02
    with pytest.raises(CheckpointError, match=r"trained with t_eps 0.02; expected 0.05$"):
        converted(held, tmp_path, "checkpoint-4.pth")


@pytest.mark.parametrize(
    ("name", "beside", "steps", "told"),
    [
        ("0000100.pt", {}, 100, None),
        ("0000100.pt", {"steps": 100}, 100, None),
        ("0000099.pt", {"steps": 100}, 100, None),  # counted before it was saved
        ("0000400.pt", {"steps": 100}, 100, None),  # images
        ("0400000.pt", {"steps": 100}, 100, "its name says 400000, the file itself step 100"),
        ("ep-0000007.pt", {"step": 100}, 100, None),  # RAE's: the number is that of an epoch
        ("ep-0000007.pt", {}, None, None),
        ("epoch_0000007.pt", {}, None, None),
        ("step-0000100.pt", {}, 100, None),
    ],
)
def test_steps_in_names_and_in_files(
    name: str, beside: dict[str, int], steps: int | None, told: str | None, tmp_path: Path
) -> None:
    ear = Ear()
    converted({"ema": net(1), **beside}, tmp_path, name, images_per_step=4, tracker=ear)
    assert read_manifest(tmp_path / "out").checkpoints[0].nimg == (steps and steps * 4)
    said = [text for text in ear.heard if "its name says" in text]
    assert [told is not None and told in text for text in said] == [True] * (told is not None)


def test_a_config_that_fits_none_of_the_families(tmp_path: Path) -> None:
    save_tensors(tmp_path / "model.safetensors", net(1))
    (tmp_path / "config.json").write_text('{"model": "sit"}')
    told = "its config says the model sit, and its tensors are of none of edm2, sit, dit, repa, jit"
    with pytest.raises(CheckpointError, match=told):
        convert(tmp_path / "model.safetensors", tmp_path / "out")


# ------------------------------------------------------------------------------ words for nothing


@pytest.mark.parametrize(
    ("hints", "told"),
    [
        ({"adapters": "products"}, "no adapter, of which --adapters products says how it is taken"),
        ({"ema_std": "0.05"}, "no post-hoc EMA, of which --ema-std says the profile; expected"),
        ({"update_every": 10}, "no post-hoc EMA, of which --update-every says the profile"),
    ],
)
def test_words_on_what_is_not_there_are_refused(
    hints: dict[str, Any], told: str, tmp_path: Path
) -> None:
    torch.save(net(1), tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=told):
        convert(tmp_path / "a.pt", tmp_path / "out", **hints)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "begun as pissa_niter_4, which changes the base"),
        ({"target_parameters": ["experts"]}, "an adapter with target_parameters; take its factors"),
        ({"init_lora_weights": True}, None),
        ({"init_lora_weights": "gaussian"}, None),
    ],
)
def test_products_are_of_adapters_that_change_nothing_else(
    setting: dict[str, Any], told: str | None, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    tensors = {"l.lora_A.weight": torch.ones(2, 3), "l.lora_B.weight": torch.ones(4, 2)}
    save_tensors(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **setting}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    convert(folder, tmp_path / "factors")
    if told is None:
        convert(folder, tmp_path / "products", adapters="products")
        assert read(tmp_path / "products")["checkpoint-1"][2] == 2
        return
    with pytest.raises(CheckpointError, match=told):
        convert(folder, tmp_path / "products", adapters="products")
