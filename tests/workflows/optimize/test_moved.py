"""A run whose folder or inputs were moved goes on, and ends as if nothing had been moved."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import merge_rl as mrl
from merge_rl.config.finetune import FinetuneConfig
from merge_rl.config.optimize import OptimizeConfig
from merge_rl.config.sampler import SamplerConfig
from merge_rl.errors import RunError
from merge_rl.interfaces import NullTracker
from merge_rl.storage.checkpoints import save_checkpoint
from merge_rl.storage.checkpoints.manifest import MANIFEST_NAME
from merge_rl.storage.runs.places import Moved, located
from merge_rl.storage.runs.run_dir import FinetuneRun, RunDir
from merge_rl.workflows.export.recipe import without_places
from merge_rl.workflows.finetune.run import resume_finetune
from tests.finetuning import outcome_of, small_config, write_sit_set

pytestmark = pytest.mark.usefixtures("no_network_here")

TinyConfig = Callable[..., OptimizeConfig]
Outcome = Callable[[Path], dict[str, object]]
Mergerl = Callable[..., Any]

SMALL: dict[str, Any] = {
    "budget": 110,
    "merge": {"scale": 0.2},
    "search": {"population": 2},
    "reward": {"pool_size": 20},
    "evaluation": {"num_images": 10, "repeats": 3},
}


class StopAfter(NullTracker):
    """Ctrl-C at the second event of a kind."""

    def __init__(self, kind: str) -> None:
        self.kind, self.left = kind, 2

    def event(self, event: Mapping[str, Any]) -> None:
        self.left -= event["kind"] == self.kind
        if self.left == 0:
            raise KeyboardInterrupt


class Listener(NullTracker):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def event(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "note":
            self.notes.append(event["text"])


# ------------------------------------------------------------------------------------- searches


class Stopped(NamedTuple):
    """PROJECT/tiny and PROJECT/runs/a, stopped in its third round; how a run ends in its place."""

    project: Path
    outcome: dict[str, object]

    @property
    def run(self) -> Path:
        return self.project / "runs/a"


@pytest.fixture(scope="module")
def _template(
    shared_tiny: Path, tiny_config: TinyConfig, outcome: Outcome,
    tmp_path_factory: pytest.TempPathFactory,
) -> Stopped:  # fmt: skip
    project = tmp_path_factory.mktemp("template") / "project"
    shutil.copytree(shared_tiny, project / "tiny")
    opened = mrl.open_checkpoints(project / "tiny")
    mrl.save_model(project / "tiny/guide", opened.read(0), opened.config)
    sampler = SamplerConfig(num_steps=2, guidance=1.5, guide=str(project / "tiny/guide"))
    config = tiny_config(project / "tiny", **SMALL, sampler=sampler)
    with pytest.raises(KeyboardInterrupt):
        mrl.optimize(
            project / "tiny", out=project / "runs/a", config=config, tracker=StopAfter("round")
        )
    shutil.copytree(project / "runs/a", project / "runs/whole")
    mrl.resume(project / "runs/whole")
    expected = outcome(project / "runs/whole")
    shutil.rmtree(project / "runs/whole")
    return Stopped(project, expected)


@pytest.fixture
def stopped(_template: Stopped, tmp_path: Path) -> Stopped:
    """In a place of the test's own, where it was begun as far as its settings tell."""
    project = tmp_path / "project"
    shutil.copytree(_template.project, project)
    settings = project / "runs/a/config.yaml"
    text = settings.read_text()
    assert str(_template.project) in text
    settings.write_text(text.replace(str(_template.project), str(project)))
    return Stopped(project, _template.outcome)


def test_a_moved_set_is_taken_from_elsewhere(
    stopped: Stopped, tmp_path: Path, outcome: Outcome
) -> None:
    elsewhere = tmp_path / "elsewhere/set"
    elsewhere.parent.mkdir()
    (stopped.project / "tiny").rename(elsewhere)
    before = outcome(stopped.run)
    with pytest.raises(RunError, match=r"checkpoints is missing: .*tiny: no such .* --checkpoints"):
        mrl.resume(stopped.run)
    assert outcome(stopped.run) == before
    mrl.resume(stopped.run, checkpoints=elsewhere)
    assert outcome(stopped.run) == stopped.outcome
    # Extractor and statistics followed, and the run keeps the new places.
    config = RunDir.open(stopped.run).config()
    assert config.checkpoints == str(elsewhere)
    assert config.reference == str(elsewhere / "evaluation/reference.safetensors")
    assert str(stopped.project) not in (stopped.run / "config.yaml").read_text()
    assert config.sampler is not None
    assert config.sampler.guide == str(elsewhere / "guide")
    mrl.resume(stopped.run)
    assert outcome(stopped.run) == stopped.outcome


def test_a_moved_run_needs_nothing_said(stopped: Stopped, tmp_path: Path, outcome: Outcome) -> None:
    run = tmp_path / "deep/er/run"
    run.parent.mkdir(parents=True)
    stopped.run.rename(run)
    settings = (run / "config.yaml").read_bytes()
    mrl.resume(run)
    assert outcome(run) == stopped.outcome
    assert (run / "config.yaml").read_bytes() == settings


def test_what_moved_with_the_run_is_found(
    stopped: Stopped, tmp_path: Path, outcome: Outcome
) -> None:
    project = stopped.project.rename(tmp_path / "renamed")
    listener = Listener()
    mrl.resume(project / "runs/a", tracker=listener)
    assert outcome(project / "runs/a") == stopped.outcome
    old = tmp_path / "project/tiny"
    assert f"checkpoints is no longer {old}; taken from {project / 'tiny'}" in listener.notes


def test_another_set_is_refused(stopped: Stopped, tmp_path: Path, outcome: Outcome) -> None:
    other = tmp_path / "other"
    shutil.copytree(stopped.project / "tiny", other)
    names = sorted((other / "raw").iterdir())
    shutil.copy(names[0], names[1])
    manifest = other / MANIFEST_NAME
    lines = [line for line in manifest.read_text().splitlines(True) if "sha256" not in line]
    manifest.write_text("".join(lines))
    before, settings = outcome(stopped.run), (stopped.run / "config.yaml").read_bytes()
    message = r"inputs have changed since it began: checkpoints \(by SHA-256\); .*--checkpoints"
    with pytest.raises(RunError, match=message):
        mrl.resume(stopped.run, checkpoints=other)
    save_checkpoint(tmp_path / "third/a.safetensors", {"w": torch.ones(2)})  # fits nothing
    save_checkpoint(tmp_path / "third/b.safetensors", {"w": torch.zeros(2)})
    listed = ", ".join(f"{{file: {name}.safetensors, track: raw}}" for name in "ab")
    text = f"version: 1\nmodel: {{}}\ncheckpoints: [{listed}]\n"
    (tmp_path / "third" / MANIFEST_NAME).write_text(text)
    with pytest.raises(RunError, match=message):
        mrl.resume(stopped.run, checkpoints=tmp_path / "third")
    with pytest.raises(RunError, match="nowhere: no such folder; expected the checkpoints of"):
        mrl.resume(stopped.run, checkpoints=tmp_path / "nowhere")
    assert outcome(stopped.run) == before
    assert (stopped.run / "config.yaml").read_bytes() == settings


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("reference.safetensors", "reference"),
        ("heldout.safetensors", "heldout"),
        ("extractor.safetensors", "extractor_weights"),
    ],
)
def test_one_sentence_for_what_is_missing(file: str, named: str, stopped: Stopped) -> None:
    path = stopped.project / "tiny/evaluation" / file
    path.unlink()
    message = rf"cannot resume, {named} is missing: {path}: no such .*a/config\.yaml where it is"
    with pytest.raises(RunError, match=message):
        mrl.resume(stopped.run)


def test_the_command_takes_the_set_from_elsewhere(
    stopped: Stopped, mergerl: Mergerl, outcome: Outcome, tmp_path: Path
) -> None:
    (stopped.project / "tiny").rename(tmp_path / "moved")
    ended = mergerl("resume", stopped.run)
    assert ended.code == 1
    assert ended.err.count("\n") == 1
    assert f"mergerl resume {stopped.run} --checkpoints PATH" in ended.err
    ended = mergerl("resume", stopped.run, "--checkpoints", tmp_path / "moved")
    assert ended.code == 0, ended.err
    assert outcome(stopped.run) == stopped.outcome


# ------------------------------------------------------------------------------------ all paths


def test_every_path_follows_or_stays(tmp_path: Path, tiny_config: TinyConfig) -> None:
    old, new, beside = (tmp_path / name for name in ("old", "new", "beside"))
    for folder in (new, beside):
        folder.mkdir()
        for name in ("reference", "heldout", "weights", "decoder", "guide", "stats.pkl"):
            (folder / name).touch()
    config = replace(
        tiny_config(old),
        reference=f"{old}/stats.pkl#fid",
        heldout=f"{beside}/heldout",
        extractor_weights="facebook/dinov2-large",
        autoencoder_weights=f"{old}/decoder",
        extra_references={"dinov2": f"{old}/reference", "other": f"{beside}/stats.pkl#fid"},
        extra_weights={"dinov2": f"{old}/weights"},
        sampler=SamplerConfig(guide=f"{old}/guide", guidance=2.0),
    )
    found = located(config, tmp_path / "a/b/c/d/e/run", new)
    assert found == replace(
        config,
        checkpoints=str(new),
        reference=f"{new}/stats.pkl#fid",
        autoencoder_weights=f"{new}/decoder",
        extra_references={"dinov2": f"{new}/reference", "other": f"{beside}/stats.pkl#fid"},
        extra_weights={"dinov2": f"{new}/weights"},
        sampler=SamplerConfig(guide=f"{new}/guide", guidance=2.0),
    )
    (new / "guide").unlink()
    with pytest.raises(RunError, match=rf"sampler\.guide is missing: {new}/guide: no such"):
        located(config, tmp_path / "a/b/c/d/e/run", new)


def test_a_recipe_tells_no_places() -> None:
    settings = {
        "checkpoints": "/a/set", "heldout": None, "seed": 1, "extra_weights": {"x": "/b", "y": "z"},
        "autoencoder_weights": "stabilityai/sd-vae-ft-mse",
    }  # fmt: skip
    assert without_places(settings) == {
        "heldout": None, "seed": 1, "extra_weights": {"y": "z"},
        "autoencoder_weights": "stabilityai/sd-vae-ft-mse",
    }  # fmt: skip


def test_what_stayed_behind_stays(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/here").touch()
    moved = Moved(tmp_path / "old", tmp_path / "new")
    assert moved.follow(tmp_path / "old/here") == tmp_path / "old/here"
    assert moved.follow(tmp_path / "old/gone") == tmp_path / "new/gone"
    assert moved.follow(tmp_path / "older") == tmp_path / "older"


# ----------------------------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize("given", ["", "raw/sit-2.safetensors"])
def test_a_moved_model_is_taken_from_elsewhere(
    given: str, shared_tiny: Path, tmp_path: Path
) -> None:
    small = write_sit_set(tmp_path / "sit", shared_tiny)
    config: FinetuneConfig = small_config(small)
    run, whole = tmp_path / "runs/here/below/run", tmp_path / "whole"
    with pytest.raises(KeyboardInterrupt):
        mrl.finetune(small, out=run, config=config, tracker=StopAfter("step"))
    shutil.copytree(run, whole)
    resume_finetune(whole)
    new = tmp_path / "elsewhere/kept"
    new.parent.mkdir()
    small.rename(new)
    with pytest.raises(RunError, match=r"model is missing: .*sit-2\.safetensors: .*--checkpoints"):
        resume_finetune(run)
    resume_finetune(run, checkpoints=new / given)
    assert outcome_of(run) == outcome_of(whole)
    found = FinetuneRun.open(run).config()
    assert found.model == str(new / "raw/sit-2.safetensors")
    assert found.extractor_weights == str(new / "evaluation/extractor.safetensors")


def test_what_moved_is_found_beside_the_folder_that_a_link_to_the_run_means(tmp_path: Path) -> None:
    for folder in ("project/run", "project/sit", "links"):
        (tmp_path / folder).mkdir(parents=True)
    link = tmp_path / "links/newest"
    link.symlink_to(tmp_path / "project/run")
    config = OptimizeConfig(checkpoints=str(tmp_path / "gone/sit"))
    assert located(config, link).checkpoints == str(tmp_path / "project/sit")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file: a file; expected the folder of the checkpoints of"):
        located(config, link, tmp_path / "file")


def test_settings_that_name_no_input_are_refused(tmp_path: Path) -> None:
    damaged = "the settings of the run are damaged: they name no"
    with pytest.raises(RunError, match=f"{damaged} checkpoints"):
        located(OptimizeConfig(), tmp_path)
    with pytest.raises(RunError, match=f"{damaged} model"):
        located(FinetuneConfig(), tmp_path)
