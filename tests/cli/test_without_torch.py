"""Commands that compute nothing need no torch: neither do they load it, nor wait for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from merge_rl.demo import write_demo
from merge_rl.storage.checkpoints import open_checkpoints, open_model_file
from merge_rl.workflows.export import merge, save_model
from tests.pages import search_run

# What a command is given, and a piece of what it prints; {} stands for the folder below.
COMMANDS = {
    "inspect a set": (["inspect", "{}/edm2"], "24 checkpoints of edm2"),
    "inspect a model": (["inspect", "{}/edm2/raw/digits-0002097.safetensors"], "float16"),
    "settings": (["settings"], "reward.pool_size"),
    "convert": (
        ["convert", "{}/sit/raw", "{}/out", "--num-heads", "4", "--family", "sit"],
        "digits-0002097",
    ),
    "convert a pickle": (["convert", "{}/sit.pt", "{}/new", "--num-heads", "4"], "sit"),
    "merge": (["merge", "{}/edm2", "{}/one", "--track", "raw", "--uniform"], "+0.1250"),
    "push what was merged": (["push", "{}/merged", "user/repo", "--dry-run"], "would push"),
    "merge in half": (
        ["merge", "{}/sit", "{}/two", "--track", "raw", "--uniform", "--dtype", "bfloat16"],
        "merged 8 checkpoints",
    ),
    "report": (["report", "{}/run"], "run/report.html"),
    "no such set": (["fetch", "edm2-img512-xss", "{}/new"], "did you mean 'edm2-img512-xs'"),
    "no plan": (["plan", "{}/nothing"], "no such folder"),
}
FORBIDDING = """
import sys
from importlib.abc import MetaPathFinder

class Forbidding(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "scipy"):
            raise ImportError(f"{name} was loaded")

sys.meta_path.insert(0, Forbidding())
from merge_rl.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder)
    weights = open_checkpoints(folder / "sit", track="raw").read(0)
    torch.save({"ema": weights}, folder / "sit.pt")
    save_model(folder / "merged", weights, None)
    search_run(folder / "run", ["a", "b"])
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_loads_no_torch(name: str, demo: Path, tmp_path: Path) -> None:
    arguments, expected = COMMANDS[name]
    given = [a.format(demo) for a in arguments]
    ended = subprocess.run(
        [sys.executable, "-c", FORBIDDING, *given], capture_output=True, text=True, timeout=120,
        cwd=tmp_path,
    )  # fmt: skip
    said = " ".join((ended.stdout + ended.stderr).split())
    assert "was loaded" not in said
    assert expected in said


def test_a_merge_without_torch_has_the_bits_of_one_with_it(demo: Path, tmp_path: Path) -> None:
    given = ["--track", "raw", "--coefficients", "0.3,-1.7,0.1,0,0.4,0.9,1e-3,1"]
    for dtype in ("float16", "bfloat16"):
        subprocess.run(
            [sys.executable, "-c", FORBIDDING, "merge", str(demo / "edm2"), dtype, *given,
             "--dtype", dtype],
            check=True, capture_output=True, timeout=120, cwd=tmp_path,
        )  # fmt: skip
        opened = open_checkpoints(demo / "edm2", track="raw")
        row = [float(value) for value in given[-1].split(",")]
        merged = save_model(tmp_path / "other", merge(opened, row), None, dtype=dtype, replace=True)
        found = [open_model_file(folder).weights for folder in (tmp_path / dtype, merged)]
        assert all(torch.equal(found[0][name], found[1][name]) for name in opened.tensors)


def test_torch_is_what_is_forbidden() -> None:
    code = FORBIDDING.partition("from merge_rl")[0] + "import torch"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "torch was loaded" in ended.stderr
