"""Commands take what other commands wrote, in every everyday form, and say what they took."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import merge_rl as mrl
from merge_rl.storage.checkpoints import open_checkpoints, open_model_file
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
