"""The public names: they resolve, they are documented, and importing them is quick."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import merge_rl as mrl
from merge_rl.config.optimize import EvaluationConfig, OptimizeConfig, RewardConfig, SearchConfig
from merge_rl.errors import ConfigError, MergeRLError, MissingLibraryError, UnknownNameError


def _sent(value: Any) -> Any:
    """What arrives of it in a worker of `multiprocessing` or of a DataLoader."""
    return pickle.loads(pickle.dumps(value))


PROMISED = [
    "CheckpointSet", "FeatureStats", "MergeRLError", "build_model", "compare_searchers", "convert",
    "evaluate", "feature_stats",
    "frechet_distance", "kernel_distance", "load_model", "merge", "open_checkpoints", "optimize",
    "prdc", "push", "resume", "sample", "save_model",
]  # fmt: skip


@pytest.mark.parametrize("name", mrl.__all__)
def test_every_public_name_resolves(name: str) -> None:
    found = getattr(mrl, name)
    if name == "__version__":
        assert isinstance(found, str)
    else:
        assert found.__name__ == name
        assert found.__module__.startswith("merge_rl.")
        assert getattr(mrl, name) is found


@pytest.mark.parametrize("name", PROMISED)
def test_promised_names_are_public_and_documented(name: str) -> None:
    assert name in mrl.__all__
    found = getattr(mrl, name)
    text = inspect.getdoc(found)
    assert text
    assert text[0].isupper()
    own = text.splitlines()[0]
    assert own.endswith((".", ":"))
    assert not own.startswith(f"{name}(")  # what dataclasses write when nobody did


def test_dir_lists_the_public_names() -> None:
    assert dir(mrl) == sorted(mrl.__all__)
    assert len(set(mrl.__all__)) == len(mrl.__all__)


@pytest.mark.parametrize("name", ["optimise", "torch", "_", "Optimize"])
def test_unknown_names_are_attribute_errors(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'merge_rl' has no attribute '{name}'"):
        getattr(mrl, name)


def test_importing_does_without_torch() -> None:
    script = (
        "import sys, merge_rl\n"
        "dir(merge_rl), merge_rl.__version__, merge_rl.MergeRLError\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "sys.modules['torch'] = None\n"  # which takes seconds to load
        "try: merge_rl.feature_stats\n"
        "except ImportError as error: assert error.name == 'torch'\n"
        "else: raise AssertionError\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")


def test_the_short_way_through(tiny: Path, tmp_path: Path) -> None:
    # What the architecture promises to those who write Python, in one go.
    opened = mrl.open_checkpoints(tiny, track="raw")
    assert len(opened) == 4
    weights = mrl.merge(opened, [0.25] * 4)
    mrl.save_model(tmp_path / "average", weights, opened.config, coefficients=[0.25] * 4)
    model = mrl.load_model(tmp_path / "average")

    generator = torch.Generator().manual_seed(0)
    noise, labels = torch.randn(6, 1, 8, 8, generator=generator), torch.arange(6)
    samples = mrl.sample(model, noise, labels, solver="heun", num_steps=2)
    assert samples.shape == noise.shape
    assert bool(samples.isfinite().all())
    blank = mrl.build_model(opened.config or {})
    assert list(blank.state_dict()) == list(model.state_dict())

    stats = mrl.feature_stats(samples.flatten(1))
    assert mrl.frechet_distance(stats, stats) == pytest.approx(0, abs=1e-9)
    assert mrl.kernel_distance(samples.flatten(1), noise.flatten(1)) > 0
    assert mrl.prdc(samples.flatten(1), samples.flatten(1), k=2).precision == 1

    config = OptimizeConfig(
        checkpoints=str(tiny), track="raw", search=SearchConfig(population=4),
        reward=RewardConfig(pool_size=40, subset_size=10, refresh_size=10),
        evaluation=EvaluationConfig(num_images=10, repeats=3, selection_images=10),
    )  # fmt: skip
    run = tmp_path / "run"
    result = mrl.optimize(tiny, budget=90, seed=0, out=run, config=config)
    assert result.run_dir == run
    assert result.coefficients.shape == (4, 4)  # a row a stage of the network
    for summary in (result.baseline, result.final):
        assert summary["heldout"]["low"] <= summary["heldout"]["mean"]
    again = mrl.resume(run)
    assert isinstance(again, mrl.OptimizeResult)
    assert again.final == result.final
    sent = _sent((opened, model, config, result, mrl.MergedModel.from_pretrained(run)))
    again_merged = mrl.merge(sent[0], [0.25] * 4)
    assert all(torch.equal(again_merged[name], weights[name]) for name in weights)
    assert torch.equal(mrl.sample(sent[1], noise, labels, solver="heun", num_steps=2), samples)
    assert sent[2] == config
    assert sent[3].final == result.final
    assert sent[4].recipe == mrl.MergedModel.from_pretrained(run).recipe
    with pytest.raises(MergeRLError, match="exists already"):
        mrl.optimize(tiny, out=run, config=config)


@pytest.mark.parametrize(
    "error",
    [
        MergeRLError("plain"),
        UnknownNameError("reward", "fid", ["fid-subset", "mmd-subset"]),
        MissingLibraryError("fetch", "timm", "latent"),
    ],
)
def test_errors_leave_a_worker_as_they_are(error: MergeRLError) -> None:
    arrived = _sent(error)
    assert type(arrived) is type(error)
    assert (str(arrived), vars(arrived)) == (str(error), vars(error))


@pytest.mark.parametrize("given", [None, 3, b"x", object()])
def test_what_is_no_path_is_refused_in_one_sentence(given: Any, tiny: Path, tmp_path: Path) -> None:
    state, config = {"weight": torch.ones(2)}, OptimizeConfig(checkpoints=str(tiny), track="raw")
    points = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    calls: list[Callable[[], object]] = [
        lambda: mrl.optimize(tiny, out=given, config=config),
        lambda: mrl.optimize(given, out=tmp_path / "run"),
        lambda: mrl.search([state] * 2, generate=lambda *_: points, reference=points, out=given),
        lambda: mrl.finetune(tiny, out=given),
        lambda: mrl.compare_searchers(config, out=given),
        lambda: mrl.save_model(given, state, None),
        lambda: mrl.convert(tiny, given),
        lambda: mrl.convert(given, tmp_path / "set"),
        lambda: mrl.open_checkpoints(given),
        lambda: mrl.load_model(given),
        lambda: mrl.evaluate(given),
        lambda: mrl.resume(given),
        lambda: mrl.push(given, "user/repo"),
    ]
    for call in calls:
        with pytest.raises(
            ConfigError, match=f"^expected a path as .*, got {type(given).__name__}$"
        ):
            call()
    assert [item.name for item in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize(("tracker", "named"), [(3, "int"), (mrl.LineTracker, "the class Line")])
def test_what_is_no_tracker_is_refused_before_anything_is_written(
    tracker: Any, named: str, tiny: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    calls: list[Callable[[], object]] = [
        lambda: mrl.optimize(tiny, out=new, tracker=tracker),
        lambda: mrl.finetune(tiny, out=new, tracker=tracker),
        lambda: mrl.convert(tiny, new, tracker=tracker),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=f"phase, advance and event, got {named}"):
            call()
    assert not (tmp_path / "new").exists()
