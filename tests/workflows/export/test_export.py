"""Model folders: whole or not at all, and what they hold."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from merge_rl.errors import ConfigError, NonFiniteWeightsError, RunError
from merge_rl.storage.checkpoints.model_file import open_model_file
from merge_rl.storage.files.atomic import new_folder
from merge_rl.workflows.export import folder as export
from merge_rl.workflows.export.folder import save_model

CONFIG = {"model": "edm2", "img_resolution": 8, "channel_mult": [1, 2]}


def weights() -> dict[str, Tensor]:
    return {
        "b.weight": torch.tensor([[1.5, -2.0], [1 / 3, 70000.0]]),
        "a.gain": torch.tensor(0.1, dtype=torch.float64),
        "steps": torch.tensor([2**40]),
    }


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_saved_folder_holds_what_was_given(tmp_path: Path) -> None:
    out = save_model(
        tmp_path / "deep/out", weights(), CONFIG, coefficients=[0.25, 0.75],
        recipe={"version": 1, "note": "größer"}, card="# Card\n",
    )  # fmt: skip
    assert listing(tmp_path / "deep") == [
        "out", "out/README.md", "out/config.json", "out/merge.yaml", "out/model.safetensors",
    ]  # fmt: skip
    assert json.loads((out / "config.json").read_text()) == CONFIG
    assert yaml.safe_load((out / "merge.yaml").read_text(encoding="utf-8")) == {
        "version": 1, "note": "größer", "dtype": "float32", "coefficients": [0.25, 0.75],
        "max_shard_bytes": 5_000_000_000,
    }  # fmt: skip
    assert (out / "README.md").read_text() == "# Card\n"
    file = open_model_file(out)
    assert file.config == CONFIG
    assert open_model_file(out / "model.safetensors").config == CONFIG
    for name, tensor in weights().items():
        expected = tensor.float() if tensor.is_floating_point() else tensor
        assert torch.equal(file.weights[name], expected)
        assert file.weights[name].dtype == expected.dtype
    # As readable by others as any folder, whatever a temporary one is made with.
    assert stat.S_IMODE(out.stat().st_mode) == 0o755


def test_without_config_and_recipe(tmp_path: Path) -> None:
    out = save_model(tmp_path / "out", weights(), None)
    assert listing(out) == ["README.md", "model.safetensors"]
    assert open_model_file(out).config is None


def test_half_precision_is_a_choice_and_may_overflow(tmp_path: Path) -> None:
    file = open_model_file(save_model(tmp_path / "b", weights(), CONFIG, dtype="bfloat16"))
    assert torch.equal(file.weights["b.weight"], weights()["b.weight"].bfloat16())
    assert torch.equal(file.weights["steps"], weights()["steps"])
    # 70000 is beyond float16: infinity is refused rather than written.
    with pytest.raises(NonFiniteWeightsError) as caught:
        save_model(tmp_path / "h", weights(), CONFIG, dtype="float16")
    said = "tensor 'b.weight' holds NaN or infinity in 1 of 4 values"
    assert str(caught.value) == f"{tmp_path / 'h' / 'model.safetensors'}: {said}"
    with pytest.raises(ConfigError, match="one of float32, float16, bfloat16, got 'int8'"):
        save_model(tmp_path / "h", weights(), CONFIG, dtype="int8")
    assert listing(tmp_path)[0] == "b"
    assert not any(path.startswith((".", "h")) for path in listing(tmp_path))


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_existing_path_is_refused(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunError, match="out exists already; choose another folder"):
        save_model(out, weights(), CONFIG)
    assert listing(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["write_weights", "write_json", "write_yaml", "write_text"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, ValueError])
def test_a_failure_in_the_middle_leaves_nothing(
    name: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, *_: Any, **__: Any) -> None:
        target = path / "x" if path.is_dir() else path
        target.write_text("half")
        raise error("no space left")

    monkeypatch.setattr(export, name, fail)
    with pytest.raises(error, match="no space left"):
        save_model(tmp_path / "out", weights(), CONFIG, coefficients=[1.0])
    assert listing(tmp_path) == []


@pytest.mark.parametrize("name", ["write_weights", "write_json", "write_yaml", "write_text"])
def test_a_failed_replacement_keeps_the_old_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = save_model(tmp_path / "out", weights(), CONFIG, coefficients=[1.0], card="old")
    before = {path: (out / path).read_bytes() for path in listing(out)}

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, name, fail)
    other = {key: value + 1 for key, value in weights().items()}
    with pytest.raises(KeyboardInterrupt):
        save_model(out, other, CONFIG, coefficients=[2.0], card="new", replace=True)
    assert {path: (out / path).read_bytes() for path in listing(out)} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_replacement_leaves_nothing_of_the_old(tmp_path: Path) -> None:
    out = save_model(tmp_path / "out", weights(), CONFIG, coefficients=[1.0], card="old")
    (out / "stray.txt").write_text("x")
    save_model(out, weights(), None, card="new", replace=True)
    assert listing(tmp_path) == ["out", "out/README.md", "out/model.safetensors"]
    assert (out / "README.md").read_text() == "new"


@pytest.mark.parametrize("prepare", [lambda p: None, lambda p: p.mkdir()])
def test_the_folder_appears_when_the_block_ends(
    prepare: Callable[[Path], None], tmp_path: Path
) -> None:
    target = tmp_path / "out"
    prepare(target)
    with new_folder(target, replace=True) as folder:
        (folder / "a").write_text("1")
        assert folder.parent == tmp_path  # a rename is atomic within one file system only
        assert not (target / "a").exists()
    assert listing(tmp_path) == ["out", "out/a"]
