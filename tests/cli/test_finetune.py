"""`mergerl finetune` as a user meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from merge_rl.config.finetune import CURVES
from merge_rl.storage.runs.run_dir import FinetuneRun
from tests.finetuning import write_sit_set

SMALL = [
    "--steps", 2, "--train-steps", 3, "--subsets", 4, "--pool", 20, "--subset", 4, "--refresh", 2,
    "--lr", 1e-3, "--eval-steps", 4, "--eval-every", 2, "--eval-images", 10, "--final-images", 10,
    "--repeats", 2, "--set", "curves.ode_solver=euler",
]  # fmt: skip


@pytest.fixture
def small(tmp_path: Path, shared_tiny: Path) -> Path:
    return write_sit_set(tmp_path / "sit", shared_tiny)


def test_a_run_and_what_can_be_done_with_it(
    small: Path, mergerl: Callable[..., Any], tmp_path: Path
) -> None:
    ended = mergerl("finetune", small, *SMALL)
    assert ended.code == 0, ended.err
    run = tmp_path / "runs/sit-2-finetune-seed0"
    assert f"mergerl optimize {run.relative_to(tmp_path)}" in ended.out.replace("\n", "")
    assert "SDE, 3 steps" in ended.out
    assert "step 2" in ended.err
    assert ended.err.count("the pool has 20 images for 64 features") == 1
    merged = mergerl("merge", run, tmp_path / "merged", "--uniform")
    assert merged.code == 0, merged.err
    inspected = mergerl("inspect", run, "--json")
    assert json.loads(inspected.out)["tracks"] == ["start", "raw", "ema"]
    scored = mergerl(
        "evaluate", run / "final", "--num-images", 10, "--repeats", 2, "--under", "sde", "--json"
    )
    assert json.loads(scored.out)["sampler"]["num_steps"] == 4


def test_json_is_one_document(small: Path, mergerl: Callable[..., Any], tmp_path: Path) -> None:
    ended = mergerl(
        "finetune", small / "raw/sit-1.safetensors", *SMALL, "--algorithm", "rs",
        "--credit", "per-image", "--out", tmp_path / "r", "--json",
    )  # fmt: skip
    document = json.loads(ended.out)
    assert set(document["comparison"]["curves"]) == set(CURVES)
    assert document["step"] == 2
    config = FinetuneRun.open(tmp_path / "r").config()
    assert (config.algorithm, config.credit) == ("rs", "per-image")


def test_options_and_files_reach_the_settings(
    small: Path, mergerl: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("reward: {pool_size: 30}\nupdate: {clip: 0.3}\nsteps: 7\n")
    ended = mergerl(
        "finetune", small, *SMALL[2:], "--config", recipe, "--out", tmp_path / "r", "--steps", 1,
        "--window", "1+1", "--ema", 0, "--kl", 0.1, "--guidance", 1, "--track", "raw",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    config = FinetuneRun.open(tmp_path / "r").config()
    assert (config.steps, config.update.clip, config.reward.pool_size) == (1, 0.3, 20)
    assert (config.rollout.window_start, config.rollout.window_size) == (1, 1)
    assert config.sampler is not None
    assert config.sampler.solver == "midpoint"  # the set's, which one option left as it is


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window", "a"], "expected --window N or S+N, got 'a'"),
        (["--credit", "imge"], "did you mean 'per-image'"),
        (["--log-to", "tensorbord"], "did you mean 'tensorboard'"),
        (["--set", "update.lr=1"], "unknown setting in config.update 'lr'"),
        (["--track", "ema"], "unknown track 'ema'"),
        (["--from-track", "ema"], "unknown track 'ema'"),
        (["--track", "tensorbord"], "unknown track 'tensorbord'"),
        (["--track", "raw", "--track", "ema"], "expected one --track, got 2: raw, ema"),
        (["--extractor", "inception"], "inception"),
        (["--resume"], "no such run directory"),
    ],
)
def test_one_sentence_and_exit_code_1(
    options: list[str], message: str, small: Path, mergerl: Callable[..., Any], tmp_path: Path
) -> None:
    ended = mergerl("finetune", small, *SMALL, "--out", tmp_path / "r", *options)
    assert ended.code == 1
    assert message in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "r").exists()


def test_resume_with_other_options_names_them(
    small: Path, mergerl: Callable[..., Any], tmp_path: Path
) -> None:
    given = ["finetune", small, *SMALL, "--out", tmp_path / "r"]
    assert mergerl(*given).code == 0
    ended = mergerl(*given, "--resume", "--lr", 1e-2)
    assert ended.code == 1
    assert "settings differ: update.learning_rate" in ended.err
    # The same options, further: nothing is done twice.
    further = mergerl(*given, "--resume", "--steps", 3, "--json")
    assert json.loads(further.out)["step"] == 3
