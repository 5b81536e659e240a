"""Devices of a launch, and runs that go on after it was restarted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from merge_rl.config.optimize import OptimizeConfig
from merge_rl.errors import ConfigError, RunError
from merge_rl.parallel.rendezvous import Place
from merge_rl.storage.runs.lifecycle import begin_run, goes_on
from merge_rl.storage.runs.run_dir import RunDir
from merge_rl.workflows.rollout.device import own_device

TinyConfig = Callable[..., OptimizeConfig]
FIRST = Place(rank=0, size=2, job="job7")
AGAIN = dataclasses.replace(FIRST, restarts=1)
INPUTS = {"hashes": {"reference": "00"}, "version": "1"}


def test_every_process_has_a_gpu_of_its_own() -> None:
    place = Place(rank=5, size=8, local_rank=1)
    assert own_device("cuda", place, count=4) == "cuda:1"
    assert own_device("cpu", place, count=0) == "cpu"
    assert own_device("cuda:3", Place(), count=4) == "cuda:3"
    with pytest.raises(ConfigError, match="expected --device cuda with several processes, got cu"):
        own_device("cuda:3", place, count=4)
    with pytest.raises(ConfigError, match="found 1 GPUs for process 2; start fewer"):
        own_device("cuda", place, count=1)


def test_a_restarted_launch_goes_on(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config, out = tiny_config(tmp_path), tmp_path / "run"
    assert not goes_on(out, AGAIN)
    begin_run(out, config, INPUTS, FIRST)
    # Restarted by torchrun, or queued again under the same name: both go on with the run.
    for place in (AGAIN, FIRST, Place(restarts=1)):
        assert goes_on(out, place)
        assert begin_run(out, config, INPUTS, place).path == out
    for place in (Place(), Place(job="job8")):
        assert not goes_on(out, place)
        with pytest.raises(RunError, match="exists already"):
            begin_run(out, config, INPUTS, place)


def test_it_goes_on_with_nothing_else(tmp_path: Path, tiny_config: TinyConfig) -> None:
    config, out = tiny_config(tmp_path), tmp_path / "run"
    begin_run(out, config, INPUTS, FIRST)
    other = dataclasses.replace(config, seed=6)
    with pytest.raises(RunError, match="was begun with other settings"):
        begin_run(out, other, INPUTS, AGAIN)
    with pytest.raises(RunError, match=r"the inputs have changed since it began: reference"):
        begin_run(out, config, {"hashes": {"reference": "11"}}, AGAIN)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep me")
    with pytest.raises(RunError, match="not a run directory"):
        begin_run(mine, config, INPUTS, AGAIN)
    assert (mine / "notes.txt").read_text() == "keep me"


def test_a_run_that_was_lost_at_birth_begins_again(tmp_path: Path, tiny_config: TinyConfig) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "inputs.json").write_text("{}")
    (out / ".tmp-12-config.yaml").write_text("half")
    run = begin_run(out, tiny_config(tmp_path), INPUTS, AGAIN)
    assert run.config() == tiny_config(tmp_path)
    assert sorted(p.name for p in out.iterdir()) == ["config.yaml", "inputs.json", "launch.json"]
    assert RunDir.open(out).read("inputs.json") == INPUTS
