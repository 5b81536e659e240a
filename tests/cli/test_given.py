"""Commands take what other commands wrote, in every everyday form, and say what they took."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import merge_rl as mrl
from merge_rl.interfaces import NullTracker
from merge_rl.storage.checkpoints import open_checkpoints, open_model_file
from merge_rl.storage.files import write_png
from tests.conftest import TinyConfig

Mergerl = Callable[..., Any]


@pytest.fixture(scope="module")
def _run(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("given") / "run"
    return mrl.optimize(shared_tiny, out=folder, config=tiny_config(shared_tiny)).run_dir


@pytest.fixture
def run(_run: Path, tmp_path: Path) -> Path:
    """A finished run of the test's own."""
    return Path(shutil.copytree(_run, tmp_path / "run"))


@pytest.fixture
def holder(shared_tiny: Path, tmp_path: Path) -> Path:
    """A folder that holds one set."""
    shutil.copytree(shared_tiny, tmp_path / "holder/only")
    return tmp_path / "holder"


def said(ended: Any) -> str:
    """Stderr of a command that ended well, in one line."""
    assert ended.code == 0, ended.err
    return " ".join(ended.err.split())


def test_a_folder_that_holds_one_set_means_the_set(holder: Path, mergerl: Mergerl) -> None:
    took = f"note: {holder}: took the set {holder / 'only'}"
    assert took in said(mergerl("merge", holder, "m", "--uniform", "--track", "raw"))
    assert took in said(mergerl("inspect", holder, "--quick"))
    plain = mrl.merge(open_checkpoints(holder / "only", track="raw"), [0.25] * 4)
    torch.testing.assert_close(open_model_file("m").weights, plain, rtol=0, atol=0)
    searched = mergerl("optimize", holder, "--searcher", "nothing")
    assert took in " ".join(searched.err.split())
    assert "unknown searcher 'nothing'" in searched.err


@pytest.mark.parametrize("command", ["optimize", "plan", "compare", "merge", "inspect", "sample"])
def test_several_sets_in_a_folder_are_named(command: str, holder: Path, mergerl: Mergerl) -> None:
    shutil.copytree(holder / "only", holder / "too")
    out = ["out", "--uniform"] if command == "merge" else []
    ended = mergerl(command, holder, *out)
    assert ended.code == 1
    expected = f"error: {holder}: holds several, name one of them: only (set), too (set)\n"
    assert ended.err == expected


def test_the_result_of_a_run_means_the_run(run: Path, mergerl: Mergerl) -> None:
    for page in ("report.md", "report.png"):
        (run / page).unlink(missing_ok=True)
    took = f"note: {run / 'merged'}: took the run {run}"
    assert took in said(mergerl("report", run / "merged"))
    assert (run / "report.md").is_file()
    assert not (run / "merged/report.md").exists()
    assert took in said(mergerl("resume", run / "merged"))
    pushed = mergerl("push", run, "user/repo", "--dry-run", "--json")
    assert f"took {run / 'merged'}, the result of the run" in said(pushed)
    assert "merge.yaml" in json.loads(pushed.out)["files"]


def test_a_run_is_no_set_but_names_its_own(run: Path, shared_tiny: Path, mergerl: Mergerl) -> None:
    ended = mergerl("merge", run, "m", "--uniform")
    assert ended.code == 1
    assert f"{run}: expected a set of checkpoints, found a run, of the set {shared_tiny}" in (
        ended.err
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["merge", "tiny/evaluation", "m", "--uniform"], "a set of checkpoints, found 3 .saf"),
        (["optimize", "pictures"], "expected a set of checkpoints, found images (1 .png)"),
        (["optimize", "model"], "model: expected at least 2 checkpoints, got 1"),
        (["sample", "tiny/evaluation/reference.safetensors"], "found statistics or features"),
        (["report", "tiny"], "tiny: expected a run, found set ("),
        (["resume", "cmp"], "cmp: a comparison goes on with the command that began it"),
        (["convert", "run", "c"], "run: a run, whose weights are .safetensors: nothing to"),
        (["inspect", "run/gone"], "run/gone: no such file or folder"),
        (["evaluate", "cmp"], "cmp: expected a model, a set or a run, found a comparison"),
    ],
)
def test_what_is_something_else_is_called_so(
    arguments: list[str], sentence: str, tiny: Path, run: Path, mergerl: Mergerl
) -> None:
    shutil.copytree(run / "merged", "model")
    Path("cmp").mkdir()
    Path("cmp/settings.json").write_text("{}")
    Path("pictures").mkdir()
    write_png(Path("pictures/a.png"), torch.zeros(1, 8, 8, dtype=torch.uint8))
    ended = mergerl(*arguments)
    assert (ended.code, ended.out) == (1, "")
    assert sentence in ended.err
    assert ended.err.count("\n") == 1


def test_a_checkpoint_of_a_set_is_published_with_a_card(tiny: Path, mergerl: Mergerl) -> None:
    pushed = mergerl("push", tiny, "user/repo", "--dry-run", "--json")
    newest = open_checkpoints(tiny).paths[-1]
    assert f"took {newest.relative_to(tiny)}, the newest of the set {tiny}" in said(pushed)
    files = json.loads(pushed.out)["files"]
    assert list(files) == ["model.safetensors", "config.json", "README.md"]


def test_a_published_set_is_fetched_first(tiny: Path, mergerl: Mergerl) -> None:
    for name in ("edm2-img512-xs-raw", "somebody/something"):
        ended = mergerl("merge", name, "m", "--uniform")
        assert f"no such folder; `mergerl fetch {name} DIR` gets it" in ended.err
    assert "mergerl fetch" not in mergerl("merge", tiny / "gone", "m", "--uniform").err


def test_fetch_lists_the_catalogue(mergerl: Mergerl) -> None:
    ended = mergerl("fetch", "--list")
    assert (ended.code, ended.err) == (0, "")
    assert "edm2-img512-xs-raw" in ended.out


def test_a_shell_completes_commands(mergerl: Mergerl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_MERGERL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "mergerl ins")
    monkeypatch.setenv("COMP_CWORD", "1")
    ended = mergerl()
    assert (ended.code, ended.out.split()) == (0, ["inspect"])


def test_python_says_what_it_took(run: Path, shared_tiny: Path, tmp_path: Path) -> None:
    heard = Notes()
    mrl.evaluate(
        run, reference=shared_tiny / "evaluation/reference.safetensors", num_images=4, repeats=2,
        extractor="digits", extractor_weights=str(shared_tiny / "evaluation/extractor.safetensors"),
        tracker=heard,
    )  # fmt: skip
    mrl.resume(run / "merged", tracker=heard)
    assert f"{run}: took {run / 'merged'}, the result of the run" in heard.texts
    assert f"{run / 'merged'}: took the run {run}" in heard.texts


class Notes(NullTracker):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def event(self, event: Mapping[str, Any]) -> None:
        self.texts += [event["text"]] if event.get("kind") == "note" else []
