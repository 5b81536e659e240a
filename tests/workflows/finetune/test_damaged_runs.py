"""What is damaged in the folder of a fine-tuning run is refused by name, at once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from merge_rl.config import CURVES, FinetuneConfig
from merge_rl.errors import RunError
from merge_rl.storage.checkpoints import CheckpointEntry, Manifest, Origin, write_manifest
from merge_rl.storage.runs import FinetuneRun
from merge_rl.workflows.finetune.learner import unpack_state
from merge_rl.workflows.finetune.scores import Curves
from merge_rl.workflows.finetune.snapshots import Snapshots

CONFIG = FinetuneConfig(model="x")
COUNTS = {"step": 3, "images": 68, "pool_step": -1, "failures": 0, "skipped": 0, "updates": 3}


@pytest.fixture
def run(tmp_path: Path) -> FinetuneRun:
    return FinetuneRun.create(tmp_path / "run", CONFIG, {"hashes": {}})


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("odd", ["x", None, 1.5, -2, True])
def test_counts_of_a_resume_point(name: str, odd: object) -> None:
    unused: Any = None
    with pytest.raises(ValueError, match=f"{name} is .*, expected a whole number"):
        unpack_state({}, {**COUNTS, name: odd}, unused, unused)


@pytest.mark.parametrize("file", ["raw-x", "start", "raw-", "7"])
def test_snapshots_say_their_step(file: str, run: FinetuneRun) -> None:
    entry = CheckpointEntry(file=f"snapshots/{file}.safetensors")
    manifest = Manifest(model={}, checkpoints=(entry,))
    write_manifest(run.path / "checkpoints_manifest.yaml", manifest)
    with pytest.raises(RunError, match=f"damaged manifest: no step in the name '{entry.file}'"):
        Snapshots(run, CONFIG, Origin(name="x", config={}))


def test_points_have_all_curves_of_the_reference_that_judges(run: FinetuneRun) -> None:
    job: Any = SimpleNamespace(config=CONFIG, references={})
    point = {curve: {"reference": 1.5} for curve in CURVES}
    run.write("curves.json", {"0": point, "10": {**point, CURVES[1]: {"reference": None}}})
    assert Curves(job, run).values(CURVES[1]) == {0: 1.5, 10: float("inf")}
    for odd in ({CURVES[0]: {"reference": 1.5}}, {**point, CURVES[1]: {"other": 1.5}}):
        run.write("curves.json", {"0": point, "10": odd})
        with pytest.raises(RunError, match="curves.json: damaged curves: '.*' is missing"):
            Curves(job, run)
