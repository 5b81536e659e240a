"""Commands that compute nothing need no torch: neither do they load it, nor wait for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
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
assert "merge_rl.config" not in sys.modules, "the list of commands waits for all settings"
"""
# Each command in a process of its own, forked from one that has what several of them import, and
# has read the options of a first one. It ends without taking apart what it had from there.
RUNNING = """
import gc, json, os
import huggingface_hub.hf_api, numpy, rich.table, rich.progress, safetensors.numpy, yaml
import merge_rl.cli.merge, merge_rl.storage.convert, merge_rl.storage.hub, merge_rl.workflows.export
given, sys.argv = json.loads(sys.argv[1]), ["mergerl", "plan", "nothing"]
try:
    main()
except SystemExit:
    pass

gc.freeze()
for name, arguments in given.items():
    with open(name, "wb") as said:
        if (child := os.fork()) == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            sys.argv = ["mergerl", *arguments]
            try:
                main()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
        os.waitpid(child, 0)
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


def run_without_torch(folder: Path, commands: Mapping[str, Sequence[object]]) -> dict[str, str]:
    """What commands say, by name, run one after the other in `folder`."""
    given = {name: [str(a) for a in arguments] for name, arguments in commands.items()}
    subprocess.run(
        [sys.executable, "-c", FORBIDDING + RUNNING, json.dumps(given)], check=True, timeout=240,
        capture_output=True, cwd=folder,
    )  # fmt: skip
    return {name: " ".join((folder / name).read_text().split()) for name in commands}


def test_commands_load_no_torch(demo: Path, tmp_path: Path) -> None:
    given = {name: [a.format(demo) for a in arguments] for name, (arguments, _) in COMMANDS.items()}
    said = run_without_torch(tmp_path, given)
    assert {name: text for name, text in said.items() if "was loaded" in text} == {}
    expected = {name: text for name, (_, text) in COMMANDS.items()}
    assert {name: said[name] for name, text in expected.items() if text not in said[name]} == {}


def test_a_merge_without_torch_has_the_bits_of_one_with_it(demo: Path, tmp_path: Path) -> None:
    given = ["--track", "raw", "--coefficients", "0.3,-1.7,0.1,0,0.4,0.9,1e-3,1"]
    dtypes = ("float16", "bfloat16")
    commands = {f"in {d}": ["merge", demo / "edm2", d, *given, "--dtype", d] for d in dtypes}
    run_without_torch(tmp_path, commands)
    opened = open_checkpoints(demo / "edm2", track="raw")
    row = [float(value) for value in given[-1].split(",")]
    for dtype in dtypes:
        merged = save_model(tmp_path / "other", merge(opened, row), None, dtype=dtype, replace=True)
        found = [open_model_file(folder).weights for folder in (tmp_path / dtype, merged)]
        assert all(torch.equal(found[0][name], found[1][name]) for name in opened.tensors)


def test_torch_is_what_is_forbidden() -> None:
    code = FORBIDDING.partition("from merge_rl")[0] + "import torch"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "torch was loaded" in ended.stderr
