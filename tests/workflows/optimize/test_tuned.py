"""Searches of guidance and of a guide's coefficients: what they move, write, and refuse."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import merge_rl as mrl
from merge_rl.config import SamplerConfig
from merge_rl.config.optimize import OptimizeConfig
from merge_rl.errors import CheckpointError, ConfigError
from merge_rl.interfaces import NullTracker
from merge_rl.workflows.assembly.defaults import find_defaults
from merge_rl.workflows.optimize import SearchResult
from tests.fixtures import Ended

TinyConfig = Callable[..., OptimizeConfig]
Outcome = Callable[[Path], dict[str, object]]
Make = Callable[..., OptimizeConfig]
WEAK = "raw/tiny-0000100.safetensors"


class Stopping(NullTracker):
    """Ctrl-C after the first round."""

    def __init__(self) -> None:
        self.left = 1

    def event(self, event: Mapping[str, Any]) -> None:
        self.left -= event.get("kind") == "round"
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.fixture
def make(shared_tiny: Path, tiny_config: TinyConfig) -> Make:
    def config(*tune: str, searcher: str = "pathwise", guide: str = WEAK, **said: Any) -> Any:
        search = {"name": searcher, "tune": tune, "start_share": 0.0, "final_share": 0.0}
        search |= {"population": None} if searcher == "pathwise" else {}
        sampler = {"num_steps": 2, "guide": str(shared_tiny / guide), **said}
        return tiny_config(
            shared_tiny, budget=140, search=search, sampler=SamplerConfig(**sampler),
            evaluation={"keep_worse": True, "num_images": 10, "selection_images": 4},
        )  # fmt: skip

    return config


def rounds_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == "round"]


@pytest.mark.parametrize("searcher", ["pathwise", "policy-gradient"])
def test_guidance_and_coefficients_move_together(
    searcher: str, make: Make, tmp_path: Path, outcome: Outcome
) -> None:
    config = make("guidance", "coefficients", searcher=searcher)
    whole, run = tmp_path / "whole", tmp_path / "run"
    result = mrl.optimize(config.checkpoints, out=whole, config=config)
    last = rounds_of(whole)[-1]
    assert len(last["theta"]) == result.coefficients.shape[1] - 1 + 3
    assert last["guidance"]["strength"] != 1
    tuned = json.loads((whole / "result.json").read_text())["tuned"]
    assert tuned["start"]["guidance"] == {"strength": 1.0, "interval": pytest.approx([0, 80])}
    assert tuned["result"]["guidance"]["strength"] != 1
    # Interrupted and resumed it ends in the same bits.
    with pytest.raises(KeyboardInterrupt):
        mrl.optimize(config.checkpoints, out=run, config=config, tracker=Stopping())
    mrl.resume(run)
    assert outcome(run) == outcome(whole)


def test_the_merged_model_is_sampled_as_it_was_searched(make: Make, tmp_path: Path) -> None:
    config, run = make("guidance", guidance=1.5), tmp_path / "run"
    result = mrl.optimize(config.checkpoints, out=run, config=config)
    # Coefficients stay those of the start.
    assert torch.equal(result.coefficients, result.found.start)
    assert [len(event["theta"]) for event in rounds_of(run)] == [3] * len(rounds_of(run))
    found = result.found.tuned["result"]["guidance"]
    said = yaml.safe_load((run / "merged/merge.yaml").read_text())["sampler"]
    assert (said["guidance"], said["guidance_interval"]) == (found["strength"], found["interval"])
    assert said["guidance_ends"] == "shared"
    assert "To be sampled with guidance" in (run / "merged/README.md").read_text()
    for model in (run, run / "merged", run / "merged/model.safetensors"):
        near = find_defaults(model)
        assert near.sampler is not None
        assert near.note is not None
        assert near.sampler.guidance == found["strength"]
        assert near.sampler.guide == config.sampler.guide  # type: ignore[union-attr]
    page = (run / "report.md").read_text() if (run / "report.md").exists() else ""
    assert not page or "merges that need no search were compared with the guidance" in page
    # To and from the other processes nothing is lost.
    back = SearchResult.from_plain(json.loads(json.dumps(result.found.to_plain())))
    assert torch.equal(back.rows, result.found.rows)
    assert back.tuned == result.found.tuned


def test_a_guide_of_checkpoints_is_merged_too(
    make: Make, tmp_path: Path, mergerl: Callable[..., Ended]
) -> None:
    config = make("guidance", "guide-coefficients", guide="raw", guidance=1.5)
    run = tmp_path / "run"
    result = mrl.optimize(config.checkpoints, out=run, config=config)
    last = rounds_of(run)[-1]
    newest = [[0.0, 0.0, 0.0, 1.0]]
    assert last["guide_coefficients"] != newest
    assert sum(last["guide_coefficients"][0]) == pytest.approx(1)
    near = find_defaults(run / "merged")
    assert near.sampler is not None
    assert near.sampler.guide == str(run / "merged/guide")
    guide, model = mrl.load_model(run / "merged/guide"), mrl.load_model(run / "merged")
    found = result.found.tuned["result"]["guide_coefficients"]
    weights = mrl.load_model(Path(config.checkpoints) / "raw/tiny-0000400.safetensors")
    name = next(iter(dict(weights.named_parameters())))
    same = torch.equal(guide.state_dict()[name], weights.state_dict()[name])
    assert same == (found == newest)
    assert torch.equal(model.state_dict()[name], weights.state_dict()[name])
    assert result.samples(2).shape[0] == 2
    # Made again from its recipe it is sampled alike, with the same guide.
    again, places = tmp_path / "again", (config.checkpoints, tmp_path / "again", "--recipe")
    assert mergerl("merge", *places, run / "merged/merge.yaml").code == 0
    for file in ("model.safetensors", "guide/model.safetensors", "guide/config.json"):
        assert (again / file).read_bytes() == (run / "merged" / file).read_bytes()
    said = [
        yaml.safe_load((f / "merge.yaml").read_text())["sampler"] for f in (again, run / "merged")
    ]
    assert said[0] == said[1]
    assert find_defaults(again).sampler == dataclasses.replace(
        near.sampler, guide=str(again / "guide")
    )
    assert (
        "Made again from a recipe. To be sampled with guidance" in (again / "README.md").read_text()
    )
    shutil.rmtree(again / "guide")
    for change, text in (
        (None, "expected the guide of the recipe"),
        ("strong", "sampler.guidance"),
    ):
        recipe = yaml.safe_load((again / "merge.yaml").read_text())
        recipe["sampler"]["guidance"] = change or recipe["sampler"]["guidance"]
        (again / "merge.yaml").write_text(yaml.safe_dump(recipe))
        ended = mergerl("merge", places[0], tmp_path / "none", "--recipe", again / "merge.yaml")
        assert (ended.code, text in ended.err) == (1, True)
        assert not (tmp_path / "none").exists()


def refused(config: OptimizeConfig, tmp_path: Path, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        mrl.optimize(config.checkpoints, out=tmp_path / "run", config=config)
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_tuned_is_refused(make: Make, tmp_path: Path) -> None:
    config = make("guidance")
    alone = dataclasses.replace(config, sampler=SamplerConfig(num_steps=3))
    refused(alone, tmp_path, "tuning guidance needs a guide network")
    lone = make("guidance", "guide-coefficients")
    with pytest.raises(CheckpointError, match="expected a folder of checkpoints, found a file"):
        mrl.optimize(lone.checkpoints, out=tmp_path / "run", config=lone)
    plain = dataclasses.replace(make("guide-coefficients"), sampler=SamplerConfig(num_steps=3))
    refused(plain, tmp_path, "needs a guide that is a set of checkpoints; pass --guide SET")
    refused(make("guide-coefficients", guide="raw"), tmp_path, "changes nothing with guidance 1")
    refused(make("guidance", searcher="lcsc"), tmp_path, "lcsc knows coefficients alone")
    with pytest.raises(
        ConfigError, match="expected tune coefficients, all a comparison scores, got guidance"
    ):
        mrl.compare_searchers(config, out=tmp_path / "all", searchers=["random"], seeds=[0])
    with pytest.raises(ConfigError, match="tune one or several names, each once"):
        make("guidance", "guidance")
    with pytest.raises(ConfigError, match="expected a start above 0, got 0"):
        mrl.optimize(
            config.checkpoints, out=tmp_path / "run", config=make("guidance", guidance=0.0)
        )
