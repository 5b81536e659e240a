"""What is found near a model: the settings of its run, of its set, or nothing."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from merge_rl.config.optimize import OptimizeConfig
from merge_rl.config.sampler import SamplerConfig
from merge_rl.config.search import MergeConfig
from merge_rl.errors import MergeRLError, RunError
from merge_rl.searchers.natural_gradient import Scaled
from merge_rl.storage.checkpoints.checkpoint_set import open_checkpoints
from merge_rl.storage.checkpoints.manifest import MANIFEST_NAME
from merge_rl.storage.runs.run_dir import RunDir
from merge_rl.workflows.assembly import resolve
from merge_rl.workflows.assembly.defaults import (
    ModelDefaults,
    find_defaults,
    require_parts_of,
)
from merge_rl.workflows.assembly.resolve import resolve_config

TinyConfig = Callable[..., OptimizeConfig]


@pytest.fixture
def run(tiny: Path, tiny_config: TinyConfig, tmp_path: Path) -> Path:
    """A run inside the folder of a set, with settings unlike the set's own."""
    config = resolve_config(tiny_config(tiny), open_checkpoints(tiny))
    sampler = SamplerConfig(num_steps=5, solver="euler")
    config = dataclasses.replace(config, sampler=sampler, heldout=None)
    return RunDir.create(tiny / "runs/a", config, {}).path


def test_many_dimensions_change_what_is_left_unsaid(
    shared_tiny: Path, tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_checkpoints(shared_tiny, track="raw")

    def resolved(search: dict[str, Any], **changes: Any) -> tuple[Any, ...]:
        named = {"population": None, **search, "name": "policy-gradient"}
        config = resolve_config(tiny_config(shared_tiny, search=named, **changes), opened)
        return config.search.population, config.search.learning_rate, config.merge.scale

    few = resolved({})
    assert few == (None, None, few[2])
    # As if the theta of this set had many values, of which many move the same weights.
    monkeypatch.setattr(resolve, "SMALL_DIM", 1)
    monkeypatch.setattr(resolve, "scaled_to", lambda *_arguments: Scaled(56, 0.5, 0.25))
    unit = MergeConfig().unit
    assert resolved({}, merge={"scale": None}) == (56, 0.5, 0.25 * unit)
    said = {"population": 8, "learning_rate": 0.7}
    assert resolved(said, merge={"scale": 0.1}) == (8, 0.7, 0.1)
    # Adam has a step of its own, and runs of the first rules keep theirs.
    assert resolved({"update": "adam"}, merge={"scale": None}) == (None, None, None)
    assert resolved({}, merge={"scale": None}, rules=1) == (None, None, None)


@pytest.mark.parametrize("model", [".", "merged", "merged/model.safetensors", "a/b/model"])
def test_from_a_run(model: str, run: Path, tiny: Path) -> None:
    # The run is nearer than the set that it lies in.
    found = find_defaults(run / model)
    evaluation = tiny.resolve() / "evaluation"
    assert found == ModelDefaults(
        extractor="digits",
        extractor_weights=str(evaluation / "extractor.safetensors"),
        reference=str(evaluation / "reference.safetensors"),
        heldout=None,
        sampler=SamplerConfig(num_steps=5, solver="euler"),
    )


@pytest.mark.parametrize("model", [".", "raw", "raw/tiny-0000100.safetensors"])
def test_from_a_set(model: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = find_defaults(tiny)
    assert expected.sampler == SamplerConfig(num_steps=2)
    assert expected.heldout == str(tiny.resolve() / "evaluation/heldout.safetensors")
    assert expected.extractor == "digits"
    monkeypatch.chdir(tiny)
    for path in (tiny / model, Path(model), str(tiny / model)):
        assert find_defaults(path) == expected


def test_a_link_is_followed(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tiny / "raw/tiny-0000100.safetensors")
    assert find_defaults(tmp_path / "model.safetensors") == find_defaults(tiny)


def test_from_nowhere(tiny: Path, tmp_path: Path) -> None:
    shutil.copy(tiny / "raw/tiny-0000100.safetensors", tmp_path / "a.safetensors")
    assert find_defaults(tmp_path / "a.safetensors") == ModelDefaults()
    assert find_defaults(tmp_path / "missing") == ModelDefaults()
    # What lies far above a model has nothing to do with it.
    deep = tiny / "a/b/c/d"
    deep.mkdir(parents=True)
    assert find_defaults(deep) == ModelDefaults()


def test_half_a_run_is_no_run(run: Path, tiny: Path) -> None:
    (run / "inputs.json").unlink()
    assert find_defaults(run / "merged") == find_defaults(tiny)


def test_a_catalogue_is_not_the_manifest_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text("version: 1\nsets: []\n")
    assert find_defaults(tmp_path) == ModelDefaults()


def test_a_malformed_manifest_is_refused(tiny: Path) -> None:
    manifest = tiny / MANIFEST_NAME
    manifest.write_text(manifest.read_text().replace("num_steps: 2", "num_step: 2"))
    with pytest.raises(MergeRLError, match="'num_step'; did you mean 'num_steps'"):
        find_defaults(tiny / "raw")
    manifest.write_text("version: 1\n")
    with pytest.raises(MergeRLError, match="the key 'model' is missing"):
        find_defaults(tiny / "raw")


def test_files_of_a_run_that_are_gone_are_asked_for_at_once(run: Path, tmp_path: Path) -> None:
    unsaid = ["extractor", "extractor_weights", "reference", "heldout", "autoencoder_weights"]
    require_parts_of(run, unsaid)  # all there
    run = run.replace(tmp_path / "away")
    evaluation = tmp_path / "tiny/evaluation"
    evaluation.replace(tmp_path / "elsewhere")
    there = f"the reference {evaluation}/reference.safetensors"
    weights = f"the extractor weights {evaluation}/extractor.safetensors"
    for asked, files, flags in (
        (unsaid, f"{there} and {weights}", "they are with --reference PATH --extractor-weights"),
        (["reference", "heldout", "extractor_weights"], there, "it is with --reference PATH$"),
        (["extractor", "extractor_weights"], weights, "it is with --extractor-weights PATH$"),
    ):
        told = f"{run} names {files}, where nothing lies any more; say where {flags}"
        with pytest.raises(RunError, match=told):
            require_parts_of(run, asked)
    require_parts_of(run, ["heldout", "extractor_weights"])  # of parts that the user names
