"""The embedded runs: written whole, small, sound, and searched from the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import merge_rl as mrl
from merge_rl.demo import DATA, DATA28, RUNS, write_demo
from merge_rl.features.digits import load_digits_extractor
from merge_rl.models.patches import position_table
from merge_rl.models.sit import SiT
from merge_rl.storage.checkpoints import open_model_file
from merge_rl.workflows.evaluate.final_scores import ENTRIES
from merge_rl.workflows.reference import load_reference

Mergerl = Callable[..., Any]

SMALL: list[object] = [
    "--track", "raw", "--budget", 140, "--pool", 40, "--subset", 10, "--population", 4,
    "--final-images", 10, "--repeats", 3, "--set", "evaluation.selection_images=10",
    "--set", "reward.refresh_size=10", "--set", "reward.max_gap=1e9", "--num-steps", 2,
]  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "digits"
    write_demo(folder)
    return folder


def test_both_runs_are_written_whole(demo: Path, tmp_path: Path) -> None:
    written = write_demo(tmp_path)
    assert written == {"edm2": tmp_path / "edm2", "sit": tmp_path / "sit"}
    assert contents(tmp_path) == contents(demo)
    shared = contents(DATA / "evaluation")
    for name, folder in written.items():
        assert contents(folder / "evaluation") == shared
        own = contents(DATA / name)
        assert contents(folder).keys() == own.keys() | {f"evaluation/{key}" for key in shared}


@pytest.mark.parametrize(("name", "megabytes"), [("edm2", 5.2), ("sit", 3.0)])
def test_runs_are_small(name: str, megabytes: float) -> None:
    assert sum(len(data) for data in contents(DATA / name).values()) < megabytes * 1e6


@pytest.mark.parametrize(("name", "snapshots", "averages"), [("edm2", 8, 16), ("sit", 8, 4)])
def test_runs_are_sound_sets(demo: Path, name: str, snapshots: int, averages: int) -> None:
    opened = mrl.open_checkpoints(demo / name)
    assert all(check.ok and check.recorded for check in opened.verify())
    assert len(opened) == snapshots + averages
    assert len(mrl.open_checkpoints(demo / name, track="raw")) == snapshots
    assert opened.licence == "Apache-2.0"
    assert {str(info.dtype) for info in opened.tensors.values()} == {"torch.float16"}
    for path in (opened.defaults.extractor_weights, opened.defaults.reference):
        assert path is not None
        assert path.is_file()


def test_the_run_of_28_pixels(mergerl: Mergerl, tmp_path: Path) -> None:
    code, out, err = mergerl("demo", "digits28", "--pixels", 28)
    assert (code, err) == (0, "")
    assert "wrote digits28/edm2: 20 checkpoints of edm2 (tracks " in out
    opened = mrl.open_checkpoints(tmp_path / "digits28/edm2")
    assert all(check.ok and check.recorded for check in opened.verify())
    assert len(mrl.open_checkpoints(tmp_path / "digits28/edm2", track="raw")) == 12
    assert sorted(opened.tracks) == ["ema-0.050", "ema-0.100", "raw"]
    assert mrl.load_model(opened.paths[-1]).sample_shape == (1, 28, 28)
    assert sum(len(data) for data in contents(DATA28).values()) < 8e6


def test_features_of_the_28_pixels_are_kept(tmp_path: Path) -> None:
    folder = write_demo(tmp_path, 28)["edm2"] / "evaluation"
    heldout = load_reference(folder / "heldout.safetensors")
    assert heldout.features is not None
    assert heldout.features.shape == (2500, 64)
    images = np.load(folder / "images.npz")
    assert images["images"].shape == (300, 28, 28)
    assert np.bincount(images["labels"]).tolist() == [30] * 10
    # The images are of that half: their features are among those that were kept.
    extractor = load_digits_extractor(open_model_file(folder / "extractor.safetensors").weights)
    found = extractor(torch.from_numpy(images["images"][:20])[:, None])
    apart = (found[:, None] - heldout.features).square().sum(2).sqrt()
    assert float(apart.amin(1).max()) < 1e-3 < float(apart.median())


def test_other_numbers_of_pixels_are_refused(mergerl: Mergerl, tmp_path: Path) -> None:
    code, _, err = mergerl("demo", "digits", "--pixels", 32)
    assert (code, err) == (1, "error: expected digits of 8 or 28 pixels, got 32\n")
    assert not (tmp_path / "digits").exists()


def test_the_sit_run(demo: Path) -> None:
    opened = mrl.open_checkpoints(demo / "sit")
    assert opened.tracks == ["raw", "ema"]
    table = position_table(48, 4).half()
    assert all(torch.equal(opened.read(i)["pos_embed"][0], table) for i in range(len(opened)))
    model = mrl.load_model(opened.paths[-1])
    assert isinstance(model, SiT)
    assert (model.sample_shape, model.label_dim, model.null_label) == ((1, 8, 8), 10, 10)
    # At the noise, whose best guess of a digit is the mean, v(x, 0) = mean - x.
    noise = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        velocity = model(noise, torch.tensor(0.0), torch.arange(200) % 10)
    assert float((velocity + noise).std(0).mean()) < 0.5 * float(noise.std(0).mean())


@pytest.mark.parametrize("existing", RUNS)
def test_an_existing_run_is_not_touched(existing: str, mergerl: Mergerl, tmp_path: Path) -> None:
    (tmp_path / f"digits/{existing}").mkdir(parents=True)
    code, out, err = mergerl("demo", "digits")
    assert (code, out) == (1, "")
    assert err == f"error: digits/{existing} exists already; choose another folder\n"
    assert [path.name for path in (tmp_path / "digits").iterdir()] == [existing]


def test_nothing_is_left_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    original = Path.replace

    def fail(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == len(RUNS):
            raise OSError("the disk is full")
        return original(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="full"):
        write_demo(tmp_path / "digits")
    assert not (tmp_path / "digits").exists()


def test_demo_says_what_to_do_next(mergerl: Mergerl, tmp_path: Path) -> None:
    code, out, err = mergerl("demo", "digits")
    assert (code, err) == (0, "")
    for name, count in (("edm2", 24), ("sit", 12)):
        assert f"wrote digits/{name}: {count} checkpoints of {name} (tracks raw, " in out
        assert f"next: mergerl optimize digits/{name}\n" in out
    large = mergerl("demo", "large", "--pixels", "28").out
    assert "next: mergerl optimize large/edm2 --config digits28\n" in large
    code, out, _ = mergerl("demo", "others", "--json")
    assert json.loads(out) == {"edm2": "others/edm2", "sit": "others/sit"}


def test_inspect_names_the_network(demo: Path, mergerl: Mergerl, golden: Path) -> None:
    for name, network in (("edm2", "edm2"), ("sit", "sit (custom)")):
        code, out, _ = mergerl("inspect", demo / name, "--quick", "--json")
        assert (code, json.loads(out)["network"]) == (0, network)
        _, out, _ = mergerl("inspect", demo / name, "--quick")
        assert f"checkpoints of {network}, " in out
    assert out.count(" raw ") == 16  # as track and as width
    assert out.count(" - ") == 4  # an EMA of constant decay has no relative width
    path = demo / "sit/raw/digits-0000262.safetensors"
    _, out, _ = mergerl("inspect", path, "--json")
    assert json.loads(out)["network"] == "sit (custom)"
    # A file without any config: its tensors tell, as far as they can.
    bare = golden / "sit/tiny/a.weights.safetensors"
    _, out, _ = mergerl("inspect", bare, "--json")
    assert json.loads(out)["network"] == "sit or dit"


def test_the_edm2_run_is_searched(demo: Path, mergerl: Mergerl) -> None:
    code, out, err = mergerl("optimize", demo / "edm2", "--out", "run", *SMALL, "--json")
    assert code == 0, err
    comparison = json.loads(out)["comparison"]
    assert comparison["headline"] == "heldout"
    assert "sde" not in comparison


def test_the_sit_run_is_searched_and_scored_under_both_samplers(
    demo: Path, mergerl: Mergerl
) -> None:
    arguments = ["--set", "sampler.sde_num_steps=3"]
    code, out, err = mergerl("optimize", demo / "sit", "--out", "run", *SMALL, *arguments)
    assert code == 0, err
    assert "the same under the SDE: sde-euler, 3 steps" in out
    assert out.count("result against start: ") == 2
    assert re.match(r"(better|worse|no clear difference): held-out FID ", out.splitlines()[-1])
    _, out, _ = mergerl("inspect", "run", "--json")
    comparison = json.loads(out)["comparison"]
    sde = comparison["sde"]
    assert (list(comparison["entries"]), list(sde["entries"])) == (
        list(ENTRIES), ["start", "result"],
    )  # fmt: skip
    assert (sde["sampler"]["solver"], sde["sampler"]["num_steps"]) == ("sde-euler", 3)
    assert list(sde["gain_over"]) == ["start"]
    values = sde["entries"]["start"]["heldout"]["values"]
    assert len(values) == 3
    assert values != comparison["entries"]["start"]["heldout"]["values"]
    assert "| result (sde-euler, 3 steps) | " in Path("run/merged/README.md").read_text()
    code, _, err = mergerl("sample", "run/merged", "--num-images", 10, "--guidance", 1.5)
    assert code == 0, err
    assert Path("samples.png").is_file()


@pytest.mark.usefixtures("no_network")
def test_an_interrupted_comparison_goes_on(
    demo: Path, mergerl: Mergerl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = [*SMALL, "--set", "sampler.sde_num_steps=3"]
    assert mergerl("optimize", demo / "sit", "--out", "whole", *arguments).code == 0

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("merge_rl.workflows.evaluate.final_scores.SamplerComparison", interrupt)
        assert mergerl("optimize", demo / "sit", "--out", "broken", *arguments).code == 1
    assert mergerl("resume", "broken").code == 0
    found, expected = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("broken", "whole")
    )
    assert found["comparison"] == expected["comparison"]


def test_guidance_without_a_null_class_is_refused(mergerl: Mergerl) -> None:
    config: dict[str, Any] = {
        "input_size": 8, "in_channels": 1, "hidden_size": 8, "depth": 1, "num_heads": 1,
        "class_dropout_prob": 0.0, "num_classes": 10,
    }  # fmt: skip
    out = mrl.save_model("plain", SiT(**config).state_dict(), {"model": "sit", **config})
    assert mergerl("sample", out, "--num-images", 2, "--num-steps", 2).code == 0
    code, _, err = mergerl("sample", out, "--num-images", 2, "--guidance", 1.5, "--force")
    assert code == 1
    assert err.startswith("error: guidance 1.5 needs a network with a null class, or a guide ")
