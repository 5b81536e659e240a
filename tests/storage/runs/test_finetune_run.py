"""The folder of a fine-tuning run: its resume points, one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from merge_rl.config import FinetuneConfig
from merge_rl.errors import RunError
from merge_rl.storage.runs.run_dir import FinetuneRun, fitting, is_finetune_run


@pytest.fixture
def run(tmp_path: Path) -> FinetuneRun:
    return FinetuneRun.create(tmp_path / "new/run", FinetuneConfig(model="m"), {"hashes": {}})


def save(run: FinetuneRun, step: int, keep: int = 2) -> list[str]:
    """The resume points after that of a step was written."""
    run.save_state(step, {"a": torch.tensor([float(step)])}, {"step": step}, keep=keep)
    return [path.name for path in run.state_paths()]


def test_a_folder_is_made_with_those_above_it(run: FinetuneRun, tmp_path: Path) -> None:
    assert is_finetune_run(run.path)
    assert not is_finetune_run(tmp_path)
    (tmp_path / "empty/inputs").mkdir(parents=True)  # of what was in memory
    made = FinetuneRun.create(tmp_path / "empty", FinetuneConfig(model="m"), {})
    assert FinetuneRun.open(made.path).config().model == "m"
    assert (run.final_path, run.state_folder) == (run.path / "final", run.path / "state")


def test_the_newest_resume_points_are_kept(run: FinetuneRun) -> None:
    assert run.load_state() is None
    assert save(run, 1) == ["step-0000001.safetensors"]
    save(run, 2)
    assert save(run, 10) == ["step-0000010.safetensors", "step-0000002.safetensors"]
    found = run.load_state()
    assert found is not None
    assert (float(found[0]["a"]), found[1]["step"]) == (10.0, 10)
    # A step that is done anew: what came after it goes, the one before it stays.
    assert save(run, 3) == ["step-0000003.safetensors", "step-0000002.safetensors"]
    assert save(run, 4, keep=1) == ["step-0000004.safetensors"]


def test_damaged_resume_points_are_passed_over(run: FinetuneRun) -> None:
    for step in (1, 2, 3):
        save(run, step, keep=3)
    newest, middle, oldest = run.state_paths()
    newest.write_bytes(b"damaged")
    told: list[str] = []
    found = run.load_state(told.append)
    assert found is not None
    assert found[1]["step"] == 2
    (text,) = told
    assert text.startswith(f"{newest}: ")
    assert text.endswith("; the one before it is used")
    for path in (middle, oldest):
        path.write_bytes(b"damaged")
    with pytest.raises(RunError, match=f"^{oldest}: .*; none of 3 can be used$"):
        run.load_state(told.append)
    assert len(told) == 3


def test_events_of_later_steps_are_dropped(run: FinetuneRun) -> None:
    for event in ({"step": 1}, {"kind": "note"}, {"step": 2}, {"step": 3}):
        run.append_event(event)
    run.keep_events_up_to(2)
    assert run.events() == [{"step": 1}, {"kind": "note"}, {"step": 2}]


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError, IndexError],
)
def test_what_does_not_fit_is_damage(error: type[Exception]) -> None:
    with pytest.raises(RunError, match="^here: damaged part: "), fitting(Path("here"), "part"):
        raise error("why")
    with pytest.raises(OSError, match="^other$"), fitting(Path("here"), "part"):
        raise OSError("other")
