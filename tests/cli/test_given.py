"""Commands take what other commands wrote, in every everyday form, and say what they took."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import merge_rl as mrl
from merge_rl.config import OptimizeConfig, SamplerConfig
from merge_rl.interfaces import NullTracker
from merge_rl.storage.checkpoints import (
    MANIFEST_NAME,
    open_checkpoints,
    open_model_file,
    save_checkpoint,
)
from merge_rl.storage.files import write_png
from merge_rl.storage.runs import RunDir
from merge_rl.workflows.assembly import find_defaults, find_model, resolve_config
from merge_rl.workflows.rollout import Subject
from tests.fixtures import TinyConfig

pytestmark = pytest.mark.usefixtures("no_network_here")

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
        (
            ["merge", "tiny", "m", "--recipe", "tiny"],
            "expected a merge.yaml, or the merge that it ",
        ),
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


def test_the_series_beside_the_last_weights_of_a_training_is_named(
    tiny: Path, mergerl: Mergerl
) -> None:
    files = sorted((tiny / "raw").glob("*.safetensors"))
    for file, place in zip(files, ("checkpoint-900", "checkpoint-1000", "."), strict=False):
        Path("run", place).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, Path("run", place, "model.safetensors"))
    left = "run: left out checkpoint-900, checkpoint-1000, of the same series; `mergerl convert` "
    for command in (("inspect", "run"), ("merge", "run", "out", "--uniform")):
        ended = mergerl(*command)
        assert (ended.code, left + "makes a set of these\n" in ended.err) == (0, True)
    ended = mergerl("optimize", "run")
    assert ended.code == 1
    assert f"run: expected at least 2 checkpoints, got 1; {left}" in ended.err


def test_downloads_that_were_cut_are_named(tiny: Path, mergerl: Mergerl) -> None:
    shutil.copytree(tiny / "raw", "set")
    for name in ("a.safetensors.part", "b.safetensors.crdownload", "notes.txt.part", "x.part"):
        Path("set", name).touch()
    ended = mergerl("inspect", "set", "--quick")
    cut = "a.safetensors.part, b.safetensors.crdownload"
    assert f"note: set: left out {cut}, whose download is not finished\n" in ended.err


def test_a_checkpoint_of_a_set_is_published_with_a_card(tiny: Path, mergerl: Mergerl) -> None:
    pushed = mergerl("push", tiny, "user/repo", "--dry-run", "--json")
    newest = open_checkpoints(tiny).paths[-1]
    assert f"took {newest.relative_to(tiny)}, the newest of the set {tiny}" in said(pushed)
    files = json.loads(pushed.out)["files"]
    assert list(files) == ["model.safetensors", "config.json", "README.md"]


def test_a_folder_of_a_set_has_the_defaults_of_the_set(tiny: Path, mergerl: Mergerl) -> None:
    small = ["--searcher", "uniform", "--budget", 300, "--final-images", 20, "--repeats", 3]
    ended = mergerl("optimize", tiny / "raw", "--out", "part", *small)
    assert ended.code == 0, ended.err
    found = RunDir.open("part").config()
    assert found.reference == str(tiny / "evaluation/reference.safetensors")
    assert found.sampler == find_defaults(tiny).sampler


@pytest.mark.usefixtures("network")
def test_a_guide_may_be_a_set_or_a_run(run: Path, tiny: Path, mergerl: Mergerl) -> None:
    newest = open_checkpoints(tiny).paths[-1]
    for number, guide in enumerate((newest, tiny, run, run / "merged")):
        guided = ["--guidance", 1.5, "--guide", guide, "--num-images", 4, "--out", f"{number}.png"]
        err = said(mergerl("sample", tiny / "raw/tiny-0000100.safetensors", *guided))
        assert ("took" in err) == (number in (1, 2))
    pictures = [Path(f"{number}.png").read_bytes() for number in range(4)]
    assert pictures[0] == pictures[1] != pictures[2] == pictures[3]
    config = OptimizeConfig(
        checkpoints=str(tiny), sampler=SamplerConfig(guide=str(tiny), guidance=1.5)
    )
    resolved = resolve_config(config, open_checkpoints(tiny))
    assert resolved.sampler is not None
    assert resolved.sampler.guide == str(newest)


def test_a_moved_set_may_be_named_by_what_holds_it(
    run: Path, holder: Path, mergerl: Mergerl
) -> None:
    said(mergerl("resume", run, "--checkpoints", holder))
    assert RunDir.open(run).config().checkpoints == str(holder / "only")


def test_a_search_of_a_comparison_is_shown(run: Path, mergerl: Mergerl) -> None:
    result = json.loads((run / "result.json").read_text())
    del result["comparison"]
    (run / "result.json").write_text(json.dumps(result))
    ended = mergerl("inspect", run)
    assert ended.code == 0, ended.err
    assert "finished" in ended.out
    assert "resume" not in ended.out


def test_a_recipe_may_be_named_by_its_model_or_run(
    run: Path, shared_tiny: Path, mergerl: Mergerl
) -> None:
    for number, recipe in enumerate(("merged/merge.yaml", "merged", ".")):
        out = f"again{number}"
        said(mergerl("merge", shared_tiny, out, "--recipe", run / recipe))
        made, expected = open_model_file(out).weights, open_model_file(run / "merged").weights
        torch.testing.assert_close(made, expected, rtol=0, atol=0)


def test_a_shard_means_its_model_and_is_none_alone(tiny: Path, mergerl: Mergerl) -> None:
    said(mergerl("merge", tiny, "whole", "--uniform", "--max-shard-size", "5kB"))
    shard = next(Path("whole").glob("model-00001-of-*.safetensors"))
    index = "whole/model.safetensors.index.json"
    took = f"{shard}: took {index}, the whole model"
    assert took in said(mergerl("sample", shard, "--num-images", 2))
    ended = mergerl("inspect", shard, "--json")
    assert f"{shard}: took the file {index}" in said(ended)
    assert ended.out == mergerl("inspect", index, "--json").out
    assert find_model(shard).path == find_model(index).path
    stray = shard.with_name("model-00009-of-00009.safetensors")
    stray.write_bytes(shard.read_bytes())
    told = f"{stray}: a shard of a model, expected {Path(index).name} to name it"
    assert told in mergerl("inspect", "whole").err
    stray.unlink()
    Path(index).unlink()
    for command in (["inspect"], ["push", "user/repo", "--dry-run"], ["merge", "m", "--uniform"]):
        ended = mergerl(command[0], "whole", *command[1:])
        assert ended.code == 1
        assert f"{shard}: a shard of a model, expected its index (model.saf" in ended.err


def test_what_is_no_network_is_not_published(tiny: Path, mergerl: Mergerl) -> None:
    newest = open_checkpoints(tiny).paths[-1]
    weights = open_model_file(newest).weights
    save_checkpoint(newest, dict(list(weights.items())[1:]))
    manifest = (tiny / MANIFEST_NAME).read_text()
    (tiny / MANIFEST_NAME).write_text(re.sub(r"(?m)^ *sha256: .*\n", "", manifest))
    ended = mergerl("push", newest, "user/repo", "--dry-run")
    assert ended.code == 1
    assert "not the tensors of the edm2 network that its config describes: 1 differ" in ended.err


def test_a_set_of_the_catalogue_is_fetched_first(tiny: Path, mergerl: Mergerl) -> None:
    ended = mergerl("merge", "edm2-img512-xs-raw", "m", "--uniform")
    assert "no such folder; `mergerl fetch edm2-img512-xs-raw DIR` gets it" in ended.err
    assert "mergerl fetch" not in mergerl("merge", tiny / "gone", "m", "--uniform").err


def test_fetch_lists_the_catalogue(mergerl: Mergerl) -> None:
    ended = mergerl("fetch", "--list")
    assert (ended.code, ended.err) == (0, "")
    assert "edm2-img512-xs-raw" in ended.out
    (known,) = [
        item for item in json.loads(mergerl("fetch", "--list", "--json").out)
        if item["name"] == "edm2-img512-xs-raw"
    ]  # fmt: skip
    assert (known["pixels"], known["files"], known["licence"]) == (512, 128, "CC-BY-NC-SA-4.0")
    refused = mergerl("fetch", "edm2-img512-xs-raw")
    assert (refused.code, refused.out) == (2, "")
    assert "expected NAME and DIR, or --list" in refused.err


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


class Scheduled(nn.Module):
    """A list of layers, and after it a schedule: buffers of numbers, which a merge carries."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.schedule = nn.Module()
        self.schedule.register_buffer("betas", torch.linspace(0.1, 0.2, 5))

    def forward(self, x: Tensor) -> Tensor:
        """Points (n, 2) to points (n, 2)."""
        made: Tensor = self.layers[1](self.layers[0](x).tanh())
        return made


def points_of(module: Subject, seeds: Sequence[int], _labels: Tensor) -> Tensor:
    assert isinstance(module, Scheduled)
    with torch.no_grad():
        made: Tensor = module(mrl.seeded_noise(seeds, (2,)))
    return made


@pytest.mark.parametrize("grouping", ["stages", "tensors"])
def test_a_recipe_says_what_a_module_carries(
    grouping: str, mergerl: Mergerl, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    run = tmp_path / "searched"
    mrl.search(
        [Scheduled() for _ in range(3)], generate=points_of, reference=torch.randn(60, 2), out=run,
        searcher="policy-gradient", population=2, pool_size=40, subset_size=10, num_images=30,
        budget=600, grouping=grouping, keep_worse=True, progress=False,
    )  # fmt: skip
    again = tmp_path / "again"
    said(mergerl("merge", run / "inputs/checkpoints", again, "--recipe", run / "merged/merge.yaml"))
    made = run / "merged/model.safetensors"
    assert (again / "model.safetensors").read_bytes() == made.read_bytes()
    assert torch.equal(load_file(made)["schedule.betas"], torch.linspace(0.1, 0.2, 5))
