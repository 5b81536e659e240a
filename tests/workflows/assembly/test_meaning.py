"""Which model is meant: a run, a set, a folder, a file; and what a folder is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_rl.errors import CheckpointError, RunError
from merge_rl.storage.checkpoints import open_checkpoints, save_checkpoint
from merge_rl.storage.files import write_json, write_png
from merge_rl.storage.hub import model_folder
from merge_rl.storage.runs import folder_kind, only_inside
from merge_rl.workflows.assembly import find_model
from merge_rl.workflows.export import save_model
from merge_rl.workflows.reference import kind_of

Command = Callable[..., Any]


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, torch.full((1, 8, 8), 7, dtype=torch.uint8))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", {"w": torch.ones(2)}, {"model": "edm2"})


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(model, folder / "merged")
    (folder / "config.yaml").write_text("checkpoints: x\n")
    (folder / "inputs.json").write_text("{}")
    write_json(folder / "result.json", {})
    return folder


def test_a_folder_is_what_its_files_are(tiny: Path, model: Path, run: Path, tmp_path: Path) -> None:
    assert folder_kind(tiny) == "set"
    assert folder_kind(tiny / "raw") == "set"
    assert folder_kind(model) == "model"
    assert folder_kind(run) == "run"
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned/finetune.yaml").touch()
    assert folder_kind(tmp_path / "tuned") == "fine-tuning run"
    (tmp_path / "empty").mkdir()
    assert folder_kind(tmp_path / "empty") == "nothing"
    picture(model / "samples.png")  # a model may come with pictures
    assert folder_kind(model) == "model"


@pytest.mark.parametrize("beside", ["statistics", "config", "nothing", "labels"])
def test_pictures_stay_pictures(tiny: Path, tmp_path: Path, beside: str) -> None:
    folder = tmp_path / "pictures"
    picture(folder / "a.png")
    if beside == "statistics":
        shutil.copy(tiny / "evaluation/reference.safetensors", folder)
    if beside == "config":
        (folder / "config.json").write_text("{}")
    if beside == "labels":
        picture(folder / "0" / "b.png")
    assert folder_kind(folder) == "images"
    assert kind_of(folder) == "images"
    with pytest.raises(CheckpointError, match=r"expected a model, a set or a run, found images \("):
        find_model(folder)


def test_what_is_meant(tiny: Path, model: Path, run: Path, tmp_path: Path) -> None:
    newest = open_checkpoints(tiny).paths[-1]
    path, note = find_model(tiny)
    assert path == newest
    assert note == f"{tiny}: took {newest.relative_to(tiny)}, the newest of the set {tiny}"
    assert find_model(tiny, "raw").path == open_checkpoints(tiny, track="raw").paths[-1]
    assert find_model(run) == (
        run / "merged", f"{run}: took {run / 'merged'}, the result of the run"
    )  # fmt: skip
    assert find_model(model) == (model, None)
    assert find_model(model / "model.safetensors") == (model / "model.safetensors", None)
    (tmp_path / "outer").mkdir()
    shutil.copytree(tiny, tmp_path / "outer/set")
    assert find_model(tmp_path / "outer").path == tmp_path / "outer/set" / newest.relative_to(tiny)


def test_numbers_tell_the_newest_of_a_folder(tmp_path: Path) -> None:
    for step in (500, 2000, 750):
        save_checkpoint(tmp_path / f"step_{step}.safetensors", {"w": torch.tensor([float(step)])})
    assert find_model(tmp_path).path == tmp_path / "step_2000.safetensors"


def test_several_in_a_folder_are_named(tiny: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "both/set")
    shutil.copytree(run, tmp_path / "both/run")
    expected = r"both: holds several, name one of them: run \(run\), set \(set\)"
    for find in (find_model, model_folder, only_inside):
        with pytest.raises(CheckpointError, match=expected):
            find(tmp_path / "both")


def test_what_is_published(tiny: Path, model: Path, run: Path) -> None:
    assert model_folder(run) == run / "merged"
    assert model_folder(model) == model_folder(model / "model.safetensors") == model
    with pytest.raises(CheckpointError, match="found a set of checkpoints; merge it first"):
        model_folder(tiny)
    (run / "result.json").unlink()
    with pytest.raises(RunError, match="the run is not finished; go on with: mergerl resume"):
        model_folder(run)
    with pytest.raises(RunError, match="the run is not finished"):
        find_model(run)


def test_commands_say_which_they_took(tiny: Path, mergerl: Command) -> None:
    done = mergerl("sample", tiny, "--num-images", "4", "--out", "s.png")
    assert done.code == 0, done.err
    assert str(find_model(tiny).note) in " ".join(done.err.split())
    assert Path("s.png").is_file()
