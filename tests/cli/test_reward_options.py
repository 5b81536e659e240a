"""Options that name a reward and the files it compares with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_rl.cli.options import build, layered, split_named
from merge_rl.config import OptimizeConfig
from merge_rl.core.distances.statistics import feature_stats
from merge_rl.errors import ConfigError
from merge_rl.workflows.reference.file import save_reference

pytestmark = pytest.mark.usefixtures("no_network_here")

Mergerl = Callable[..., Any]
QUICK = [
    "--track", "raw", "--budget", 90, "--pool", 40, "--subset", 10, "--population", 4,
    "--set", "reward.refresh_size=10", "--final-images", 10, "--repeats", 3,
    "--set", "evaluation.selection_images=10",
]  # fmt: skip


def test_paths_with_and_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["real.pkl#fid", "dinov2=a=b.npz", "my.module:make=C:/x"]
    assert split_named("--reference", given) == (
        "real.pkl#fid", {"dinov2": "a=b.npz", "my.module:make": "C:/x"},
    )  # fmt: skip
    assert split_named("--reference", []) == (None, None)
    assert split_named("--reference", ["runs/a=b/x.npz"]) == ("runs/a=b/x.npz", None)
    # What exists is a path.
    monkeypatch.chdir(tmp_path)
    Path("seed=3.npz").touch()
    assert split_named("--reference", ["seed=3.npz"]) == ("seed=3.npz", None)
    with pytest.raises(ConfigError, match="one --reference without NAME=, got 2: a, b"):
        split_named("--reference", ["a", "n=c", "b"])


def test_options_add_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("extra_references: {a: 1.npz, b: 2.npz}\n")
    given = {"extra_references": {"b": "3.npz", "a.b:c": "4.npz"}}

    def references(file: Path | None) -> object:
        return build(OptimizeConfig, layered(given, file=file), checkpoints="x").extra_references

    assert references(file) == {"a": "1.npz", "b": "3.npz", "a.b:c": "4.npz"}
    assert references(None) == given["extra_references"]


def test_a_sum_over_two_extractors(mergerl: Mergerl, tiny: Path, tmp_path: Path) -> None:
    # The module lies beside the command.
    Path("brightness.py").write_text(
        "class Brightness:\n"
        "    name, dim = 'brightness', 2\n"
        "    def __call__(self, images):\n"
        "        flat = images.float().flatten(1) / 255\n"
        "        return flat[:, :2] + flat.mean(1, keepdim=True)\n"
    )
    features = torch.rand(30, 2, generator=torch.Generator().manual_seed(1))
    save_reference("real.safetensors", feature_stats(features), extractor="brightness")
    name = "brightness:Brightness"
    reward = f"fid-influence + 0.2 * fd-{name}-subset"
    code, out, err = mergerl(
        "optimize", tiny, "--out", "run", *QUICK, "--reward", reward,
        "--reference", f"{name}=real.safetensors", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["search_images"] == 90
    (event,) = [json.loads(line) for line in Path("run/events.jsonl").read_text().splitlines()]
    assert list(event["terms"]) == ["fid-influence", f"fd-{name}-subset"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reward", "fid-subset + dinov2"], "unknown reward 'dinov2'"),
        (["--reward", "fid-subset, kid-subset"], "found ', kid-subset' after 'fid-subset'"),
        (["--reward", "kid-subset"], "kid-subset compares with the features of real images"),
        (["--reward", "fd-dinov2-subset"], "statistics of real data, --reference dinov2=PATH"),
        (["--reference", "dinov2=x"], "has no use for a file of 'dinov2'"),
        (["--reference", "a", "--reference", "b"], "one --reference without NAME=, got 2: a, b"),
    ],
)
def test_what_is_refused(options: list[str], message: str, mergerl: Mergerl, tiny: Path) -> None:
    code, out, err = mergerl("optimize", tiny, "--out", "run", *QUICK, *options)
    assert (code, out) == (1, "")
    assert message in " ".join(err.split())
    assert not Path("run").exists()


def test_help_names_the_rewards(mergerl: Mergerl) -> None:
    _, out, _ = mergerl("optimize", "--help")
    text = " ".join(out.replace("│", " ").split())
    assert "fid-influence (first order, faster)" in text
    assert "[NAME=]PATH" in text
