"""Folders of one checkpoint or of several, and what each holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_rl.errors import CheckpointError, ConfigError
from merge_rl.storage.convert.contents import NO_HINTS, Hints
from merge_rl.storage.convert.inputs import list_files
from merge_rl.storage.convert.layouts import files_in, place_of, read_library, steps_of
from merge_rl.storage.convert.sources import extract, files_of
from merge_rl.storage.files import save_tensors


def laid(folder: Path, *names: str) -> Path:
    """A folder with these files, tensors where they are said to be."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_tensors(path, {"w": torch.ones(1)})
        else:
            path.touch()
    return folder


@pytest.mark.parametrize(
    ("folder", "names", "kind", "weights", "averages"),
    [
        ("a", [".metadata"], "distcp", ".metadata", []),
        ("a", ["pytorch_model_fsdp_0/.metadata"], "distcp", "pytorch_model_fsdp_0/.metadata", []),
        ("a", ["adapter_config.json", "adapter_model.bin"], "peft", "adapter_model.bin", []),
        ("a", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"], "peft",
         "adapter_model.safetensors", []),
        ("step-7", ["model.safetensors"], "accelerate", "model.safetensors", []),
        ("a", ["model.safetensors", "optimizer.bin"], "accelerate", "model.safetensors", []),
        ("a", ["model.safetensors", "custom_checkpoint_10.pkl", "custom_checkpoint_9.pkl"],
         "accelerate", "model.safetensors",
         ["custom_checkpoint_9.pkl", "custom_checkpoint_10.pkl"]),
        ("a", ["pytorch_model.bin", "scaler.pt"], "accelerate", "pytorch_model.bin", []),
        ("a", ["unet/model.safetensors", "unet_ema/model.safetensors"], "diffusers",
         "unet/model.safetensors", ["unet_ema/model.safetensors"]),
        ("checkpoint-5", ["unet/diffusion_pytorch_model.safetensors"], "diffusers",
         "unet/diffusion_pytorch_model.safetensors", []),
        ("a", ["unet/diffusion_pytorch_model.safetensors", "random_states_0.pkl"], "diffusers",
         "unet/diffusion_pytorch_model.safetensors", []),
    ],
)  # fmt: skip
def test_folders_of_one_checkpoint(
    folder: str, names: list[str], kind: str, weights: str, averages: list[str], tmp_path: Path
) -> None:
    place = place_of(laid(tmp_path / folder, *names))
    assert place is not None
    assert (place.kind, place.weights) == (kind, tmp_path / folder / weights)
    assert list(place.averages) == [tmp_path / folder / name for name in averages]
    assert files_in(tmp_path / folder) == [tmp_path / folder]
    if kind in ("accelerate", "diffusers"):
        assert files_of(tmp_path / folder) == [place.weights, *place.averages]


@pytest.mark.parametrize(
    ("folder", "names", "files"),
    [
        ("a", ["model.safetensors"], ["model.safetensors"]),  # no number, nothing beside
        ("a-1", ["m.safetensors", "model.safetensors"], ["m.safetensors", "model.safetensors"]),
        ("a-1", ["model.safetensors", "b.pt"], ["b.pt"]),
        ("a", ["b10.pt", "b9.PT", "optimizer.pt", "c.txt"], ["b9.PT", "b10.pt"]),
        ("a", ["a.pkl", "training-state-1.pt", "b.pt"], ["a.pkl", "b.pt"]),
        ("a", ["training-state-1.pt", "b.pt"], ["b.pt", "training-state-1.pt"]),
        ("a", ["1.200.pt", "0.1000.pt", "1.30.pt", "x.pt"], ["0.1000.pt", "1.30.pt", "1.200.pt"]),
        ("a", ["step-10/model.safetensors", "step-9/model.safetensors", ".x-1/model.safetensors"],
         ["step-9", "step-10"]),
    ],
)  # fmt: skip
def test_folders_of_several(
    folder: str, names: list[str], files: list[str], tmp_path: Path
) -> None:
    path = laid(tmp_path / folder, *names)
    assert place_of(path) is None
    assert files_in(path) == [path / name for name in files]


def test_what_a_folder_of_bin_files_holds(tmp_path: Path) -> None:
    index, shards = "a.bin.index.json", ["a-00001-of-00002.bin", "a-00002-of-00002.bin"]
    folder = laid(
        tmp_path / "models", index, *shards, "step_2000.bin", "step_500.bin", "optimizer.bin"
    )
    assert [file.name for file in files_in(folder)] == [index, "step_500.bin", "step_2000.bin"]
    first = {"a.weight": torch.ones(2)}
    torch.save(first, folder / shards[0])
    torch.save({"b.weight": torch.zeros(1)}, folder / shards[1])
    homes = {"a.weight": shards[0], "b.weight": shards[1]}
    (folder / index).write_text(json.dumps({"weight_map": homes}))
    (found,) = extract(folder / index)
    assert (found.stem, found.tensors.keys()) == ("a", homes.keys())
    torch.testing.assert_close(found.tensors["a.weight"].load(), first["a.weight"])
    with pytest.raises(
        CheckpointError, match=r"a-00001-of-00002\.bin: a shard of a model, expected"
    ):
        extract(folder / shards[0])


def test_a_shard_means_the_model_of_its_index(tmp_path: Path) -> None:
    shards = [tmp_path / f"m-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, shard in enumerate(shards):
        save_tensors(shard, {f"{i}.weight": torch.ones(1)})
    with pytest.raises(
        CheckpointError, match=r"a shard of a model, .* \(\.safetensors\.index\.json"
    ):
        extract(list_files(shards[0])[0][0])
    index = tmp_path / "m.safetensors.index.json"
    homes = {f"{i}.weight": shard.name for i, shard in enumerate(shards)}
    index.write_text(json.dumps({"weight_map": homes}))
    assert list_files(shards) == ([index], [])
    assert extract(index)[0].tensors.keys() == homes.keys()


def test_a_series_that_changed_its_format_is_one(tmp_path: Path) -> None:
    """What was made of a file, and the weights of something else, are not of it."""
    names = ("step_9.pt", "step_80.safetensors", "step_700.pt", "step_6000.safetensors")
    for name in (*names, "step_9.safetensors", "vae.safetensors", "model.safetensors"):
        (tmp_path / name).touch()
    assert [file.name for file in files_in(tmp_path)] == list(names)
    (tmp_path / "other.pt").touch()
    assert len(files_in(tmp_path)) == 5


def test_folders_that_hold_no_weights(tmp_path: Path) -> None:
    for name, names, told in (
        ("a", ["adapter_config.json"], "an adapter_config.json without adapter_model.safetensors"),
        (
            "b",
            ["unet/x", "unet_ema/x", "vae/x", "vae_ema/x"],
            "holds several networks, unet, vae; name",
        ),
        ("c", ["optimizer.bin"], "holds optimizer.bin, what training goes on with, and no weights"),
        ("d", ["x.txt"], "holds no checkpoints to convert"),
    ):
        with pytest.raises(CheckpointError, match=f"{name}: {told}"):
            list_files(laid(tmp_path / name, *names))
    with pytest.raises(CheckpointError, match="e: no such file or folder"):
        list_files(tmp_path / "e")
    with pytest.raises(
        ConfigError, match="expected at least one file or folder to convert, got none"
    ):
        list_files([])


def test_a_file_counts_once_under_its_own_name(tmp_path: Path) -> None:
    file, link = laid(tmp_path, "b.pt") / "b.pt", tmp_path / "a.pt"
    link.symlink_to(file)
    assert list_files([link, file, file]) == (
        [file], [f"{link} and {file} are the same file and count once, as b.pt"],
    )  # fmt: skip
    assert list_files(file) == ([file], [])


@pytest.mark.parametrize(
    ("name", "steps"),
    [("checkpoint-12", 12), ("step_7", 7), ("global_step8", 8), ("steps=9", 9), ("iter-3", 3),
     ("iteration_4", 4), ("epoch-5", None), ("step-7-x", None), ("7", None)],
)  # fmt: skip
def test_steps_in_names(name: str, steps: int | None) -> None:
    assert steps_of(Path("x") / name) == steps


def test_networks_of_the_library(tmp_path: Path) -> None:
    unet, average = tmp_path / "unet/m.safetensors", tmp_path / "unet_ema/m.safetensors"
    laid(tmp_path, "unet/m.safetensors", "scheduler/scheduler_config.json")
    (tmp_path / "scheduler/scheduler_config.json").write_text("{}")

    def tracks(path: Path, weights: str, hints: Hints = NO_HINTS) -> list[tuple[Any, Any]]:
        found = read_library(path, {}, weights, hints)
        assert found is not None
        return [(item.track, item.config and item.config["num_classes"]) for item in found]

    assert read_library(unet, {}, "auto", Hints()) is None
    document: dict[str, Any] = {"_class_name": "UNet2DModel", "num_class_embeds": 11}
    (unet.parent / "config.json").write_text(json.dumps(document))
    assert [tracks(unet, weights) for weights in ("auto", "model", "ema")] == [[(None, 10)]] * 2 + [
        []
    ]
    assert tracks(unet, "auto", Hints(num_classes=7)) == [(None, 7)]
    for null, classes in ((True, 10), (False, 11)):
        assert tracks(unet, "auto", Hints(null_class=null)) == [(None, classes)]
    laid(tmp_path, "unet_ema/m.safetensors")
    (average.parent / "config.json").write_text(json.dumps(document))
    assert [tracks(unet, weights) for weights in ("auto", "model", "both")] == [
        [],
        *[[("raw", 10)]] * 2,
    ]
    assert [tracks(average, weights) for weights in ("auto", "ema", "model")] == [
        *[[("ema", 10)]] * 2,
        [],
    ]
    for channels, decoder in ((4, "sd-vae-sit"), (3, None)):
        transformer = {"_class_name": "DiTTransformer2DModel", "in_channels": channels}
        (unet.parent / "config.json").write_text(json.dumps(transformer))
        (found,) = read_library(unet, {}, "both", Hints()) or []
        assert found.autoencoder == decoder
    (unet.parent / "config.json").write_text('{"_class_name": "VAE"}')
    with pytest.raises(
        CheckpointError, match="expected UNet2DModel or DiTTransformer2DModel, found 'VAE'"
    ):
        read_library(unet, {}, "auto", Hints())


def test_a_run_is_its_checkpoints_not_the_last_weights_beside_them(tmp_path: Path) -> None:
    """transformers' Trainer ends with save_model(), into the folder of the run."""
    saved = [f"checkpoint-{step}" for step in (20, 100)]
    names = [f"{name}/{file}" for name in saved for file in ("model.safetensors", "optimizer.pt")]
    for last in (["model.safetensors", "training_args.bin"], ["model.safetensors"], ["last.pt"]):
        run = laid(tmp_path / "-".join(last), *names, *last)
        files, told = list_files(run)
        assert files == [run / name for name in saved]
        assert told == [f"{run}: took the checkpoints in folders of their own; left {last[0]}"]
    laid(run, "final/model.safetensors", "final/training_args.bin", "pipe/model_index.json")
    files, told = list_files(run)
    assert files == [run / name for name in (*saved, "final")]
    assert told[0].endswith(f"left {last[0]}, pipe")
    whole = run / "checkpoint-20"  # DeepSpeed's own state lies in transformers' checkpoint
    laid(whole, "global_step20/mp_rank_00_model_states.pt")
    assert list_files(whole) == ([whole], [])
    laid(run, "first.pt")  # several of its own: these
    assert [file.name for file in list_files(run)[0]] == ["first.pt", "last.pt"]


def test_checkpoints_some_folders_below_are_found_where_one_folder_has_them(tmp_path: Path) -> None:
    run = laid(
        tmp_path / "run", "lightning_logs/version_0/checkpoints/step=5.ckpt", "config/a.yaml"
    )
    inner = "lightning_logs/version_0/checkpoints"
    assert list_files(run) == (
        [run / inner / "step=5.ckpt"], [f"{run}: took the checkpoints in {inner}"]
    )  # fmt: skip
    laid(run / inner, "epoch=1-val/loss=0.5.ckpt")  # by a name with a slash
    assert list_files(run)[1][1:] == [
        f"{run / inner}: took the files in it; left those in epoch=1-val"
    ]
    own = laid(tmp_path / "own", "final.ckpt", f"{inner}/step=5.ckpt")
    told = f"{own}: took the files in it; left those in {inner}"
    assert list_files(own) == ([own / "final.ckpt"], [told])
    laid(run, "lightning_logs/version_1/checkpoints/step=5.ckpt")
    with pytest.raises(CheckpointError, match=r"itself; some lie in .*sion_0/ch.*, .*sion_1/check"):
        list_files(run)
