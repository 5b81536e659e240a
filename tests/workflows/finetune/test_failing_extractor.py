"""Extractors that give no numbers for some images: named, and no result is made of the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import merge_rl as mrl
from merge_rl.errors import StatisticsError, TrainingError
from merge_rl.interfaces import NullTracker
from merge_rl.workflows.finetune import resume_finetune
from merge_rl.workflows.finetune.step import StepParts
from merge_rl.workflows.rollout import Rollout
from tests.finetuning import small_config, write_sit_set

TOLD = "the extractor digits gives features that are not finite for 2 of {} images"
Failing = Callable[..., None]


@pytest.fixture
def small(tmp_path: Path, shared_tiny: Path) -> Path:
    return write_sit_set(tmp_path / "sit", shared_tiny)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    """A function: for two images of these phases there are no features from now on."""
    real = StepParts.features

    def begin(*phases: str, mark: float = torch.inf) -> None:
        def features(
            self: StepParts, rollout: Rollout, seeds: list[int], labels: Tensor, phase: str = ""
        ) -> Tensor:
            found = real(self, rollout, seeds, labels, phase)
            if phase.startswith(phases):
                found[1:3] = mark  # as a rollout tells whose doing it is
            return found

        monkeypatch.setattr(StepParts, "features", features if phases else real)

    return begin


class Heard(NullTracker):
    """Keeps warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def event(self, event: Mapping[str, Any]) -> None:
        if event["kind"] == "warning":
            self.warnings.append(event["text"])


def test_a_result_without_a_score_is_not_written(
    small: Path, tmp_path: Path, failing: Failing
) -> None:
    run, heard = tmp_path / "run", Heard()
    failing("result-3/sde-train/1", "curve ode-eval")
    with pytest.raises(StatisticsError) as end:
        mrl.finetune(small, out=run, config=small_config(small), tracker=heard)
    told = f"{run}: no score of the result under sde-train: {TOLD.format(10)}; go on with mergerl"
    assert str(end.value) == f"{told} resume"
    assert [text for text in heard.warnings if text.startswith("no score")] == [
        f"no score of step {step} under ode-eval: {TOLD.format(10)}" for step in (0, 2, 3)
    ]
    assert not (run / "final").exists()
    assert not (run / "result.json").exists()
    failing()
    result = resume_finetune(run)
    assert result.comparison["curves"]["sde-train"]["gain"]["mean"] is not None
    assert result.curves[2]["ode-eval"]["reference"] is None  # a gap, and no number of the others
    assert (run / "final").is_dir()


def test_steps_that_the_extractor_fails_are_its_doing(
    small: Path, tmp_path: Path, failing: Failing
) -> None:
    failing("rollouts of step")
    with pytest.raises(TrainingError) as end:
        mrl.finetune(small, out=tmp_path / "run", config=small_config(small))
    assert f"(1..3) had a reward that is not finite: {TOLD.format(16)}; the state" in str(end.value)
    assert str(end.value).endswith("; once the extractor is mended, go on with mergerl resume")


def test_samples_that_are_not_finite_are_those_of_the_weights(
    small: Path, tmp_path: Path, failing: Failing
) -> None:
    heard = Heard()
    failing("result-3/ode-train/0", mark=torch.nan)
    result = mrl.finetune(small, out=tmp_path / "run", config=small_config(small), tracker=heard)
    said = "the model makes samples that are not finite for 2 of 10 images"
    assert f"no score of the result under ode-train: {said}" in heard.warnings
    assert result.comparison["curves"]["ode-train"]["gain"]["mean"] is None
