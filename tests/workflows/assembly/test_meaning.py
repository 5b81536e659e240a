"""Which model is meant: a run, a set, a folder, a file; and what a folder is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_rl.cli.convert import require_convertible
from merge_rl.errors import CheckpointError, ConfigError, RunError
from merge_rl.storage.checkpoints import open_checkpoints, open_model_file, save_checkpoint
from merge_rl.storage.files import write_json, write_png
from merge_rl.storage.runs import find_run, find_set, folder_kind, only_inside, result_of
from merge_rl.workflows.assembly import find_defaults, find_model
from merge_rl.workflows.export import save_model
from merge_rl.workflows.export.publish import publishable
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


@pytest.mark.parametrize(
    ("there", "lacking"),
    [
        (["inputs.json", "events.jsonl", "state.safetensors"], "a run whose config.yaml"),
        (["config.yaml", "events.jsonl"], "a run whose inputs.json"),
        (["inputs.json", "events.jsonl", "state"], "a fine-tuning run whose finetune.yaml"),
        (["compare.json"], "a comparison whose settings.json"),
    ],
)
def test_a_run_that_lacks_a_file_is_no_model(
    there: list[str], lacking: str, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for name in there:
        if name == "state":
            (folder / name).mkdir()
        elif name.endswith(".safetensors"):  # a resume point, which is no network's
            save_checkpoint(folder / name, {"theta": torch.ones(2)})
        else:
            (folder / name).touch()
    for find, error in (
        (find_model, CheckpointError),
        (find_set, CheckpointError),
        (find_run, RunError),
    ):
        with pytest.raises(error, match=rf"damaged: expected .*, found {lacking} is missing \("):
            find(folder)
    with pytest.raises(ConfigError, match=f"expected checkpoints, found {lacking} is missing"):
        require_convertible(folder)
    assert kind_of(folder) == "model"  # whose reader says the same


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
    for find in (find_model, find_set, find_run, only_inside):
        with pytest.raises(CheckpointError, match=expected):
            find(tmp_path / "both")


def test_which_set_is_meant(tiny: Path, model: Path, run: Path, tmp_path: Path) -> None:
    assert find_set(tiny) == (tiny, None)
    assert find_set(model) == (model, None)  # a set of one
    shutil.copytree(tiny, tmp_path / "outer/set")
    found = find_set(tmp_path / "outer")
    assert found == (
        tmp_path / "outer/set", f"{tmp_path / 'outer'}: took the set {tmp_path / 'outer/set'}"
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="expected a set of .*, found a run, of the set x$"):
        find_set(run)
    assert find_set(tmp_path / "gone") == (tmp_path / "gone", None)


def test_which_run_is_meant(model: Path, run: Path, tmp_path: Path) -> None:
    assert find_run(run) == (run, None)
    for inside in ("merged", "merged/model.safetensors", "result.json"):
        expected = f"{run / inside}: took the run {run}"
        assert find_run(run / inside) == (run, expected)
    shutil.copytree(run, tmp_path / "runs/one")
    assert find_run(tmp_path / "runs").path == tmp_path / "runs/one"
    for other in (tmp_path / "gone", run / "gone"):
        assert find_run(other) == (other, None)
    with pytest.raises(RunError, match=r"model: expected a run, found model \(1 "):
        find_run(model)
    heard: list[str] = []
    (tmp_path / "a.txt").touch()
    (tmp_path / "lost.safetensors").symlink_to("nothing")  # beside it, and of no run
    assert find_run(tmp_path / "a.txt") == (tmp_path / "a.txt", None)
    assert find_run(run / "merged").told(heard.append) == run
    assert find_run(run).told(heard.append) == run
    assert heard == [f"{run / 'merged'}: took the run {run}"]


def test_a_run_without_a_result_has_no_model(run: Path) -> None:
    assert result_of(run) == run / "merged"
    (run / "result.json").unlink()
    for find in (result_of, find_model):
        with pytest.raises(RunError, match="the run is not finished; go on with: mergerl resume"):
            find(run)


@pytest.mark.parametrize("what", ["set", "run", "file", "model", "bare"])
def test_what_is_published(what: str, tiny: Path, tmp_path: Path) -> None:
    opened = open_checkpoints(tiny)
    newest, config = opened.paths[-1], opened.config
    weights = open_model_file(newest).weights
    half = {name: tensor.half() for name, tensor in weights.items()}
    model = save_model(tmp_path / "model", half, config, card="# Mine", dtype="float16")
    if what == "bare":
        (model / "README.md").unlink()
    if what == "run":
        write_json(tmp_path / "run/result.json", {})
        for name in ("config.yaml", "inputs.json"):
            (tmp_path / "run" / name).write_text("{}")
        model = model.rename(tmp_path / "run/merged")
    path = {"set": tiny, "file": newest, "run": tmp_path / "run"}.get(what, model)
    with publishable(find_model(path).path) as folder:
        found = open_model_file(folder)
        card = (folder / "README.md").read_text() if (folder / "README.md").is_file() else ""
    assert found.config == config
    sent = weights if what in ("set", "file") else half
    for name, tensor in sent.items():
        torch.testing.assert_close(found.weights[name], tensor, rtol=0, atol=0)
    assert (card == "# Mine") == (what in ("run", "model"))
    if what in ("set", "file"):
        assert f"after {opened.nimg[-1]:,} training images" in card
        assert not folder.exists()


def test_commands_say_which_they_took(tiny: Path, mergerl: Command) -> None:
    done = mergerl("sample", tiny, "--num-images", "4", "--out", "s.png")
    assert done.code == 0, done.err
    assert str(find_model(tiny).note) in " ".join(done.err.split())
    assert Path("s.png").is_file()


def test_links_to_themselves_and_hidden_folders_are_nothing(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="loop: no such file or folder"):
        find_model(tmp_path / "loop")
    with pytest.raises(CheckpointError, match="loop: no such file or folder"):
        open_model_file(tmp_path / "loop")
    assert find_defaults(tmp_path / "loop").extractor is None
    (tmp_path / "outer").mkdir()
    shutil.copytree(tiny, tmp_path / "outer/.hidden")
    shutil.copytree(tiny, tmp_path / "outer/set")
    assert only_inside(tmp_path / "outer") == tmp_path / "outer/set"


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("global_step9", "global_step10"), ("epoch_1-step_9", "epoch_1-step_10"), ("9", "10"),
        ("ckpt=9", "ckpt=10"), ("iter_5e5", "iter_1e6"), ("Step-500k", "Step-1M"),
    ],
)  # fmt: skip
def test_folders_are_a_series_by_their_numbers(earlier: str, later: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"width": 2}')
    for name in (earlier, later):
        save_checkpoint(tmp_path / name / "model.safetensors", {"w": torch.ones(2)})
    newest = tmp_path / later / "model.safetensors"
    assert find_model(tmp_path).path == newest
    assert open_model_file(newest).config == open_checkpoints(tmp_path, distinct=False).config
    assert open_model_file(newest).config == {"width": 2}


def test_a_folder_of_the_hubs_cache_means_its_snapshot(tiny: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--user--repo"
    shutil.copytree(tiny, cache / "snapshots/abc")
    (cache / "blobs").mkdir()
    assert find_set(cache).path == cache / "snapshots/abc"
    assert find_model(cache).path.is_relative_to(cache / "snapshots/abc")
