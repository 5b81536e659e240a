"""`mergerl merge`: recipes make the same files again, profiles in one pass, sizes, refusals."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import merge_rl as mrl
from merge_rl.cli.merge import parse_size
from merge_rl.errors import ConfigError
from merge_rl.storage.checkpoints.checkpoint_set import open_checkpoints
from merge_rl.storage.checkpoints.model_file import open_model_file

pytestmark = pytest.mark.usefixtures("no_network_here")

Command = Callable[..., Any]


def digests(folder: Path) -> dict[str, str]:
    files = [f for f in folder.iterdir() if "safetensors" in f.name or f.name == "config.json"]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("limit", ["5GB", "2KB"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_recipe_makes_the_same_files(
    dtype: str, limit: str, threads: int, tiny: Path, mergerl: Command, tmp_path: Path
) -> None:
    options = ("--track", "raw", "--coefficients", "0.1,-0.3,0,1.2", "--dtype", dtype)
    first = mergerl("merge", tiny, "one", *options, "--max-shard-size", limit)
    assert first.code == 0, first.err
    assert (len(list(Path("one").glob("*.safetensors"))) > 1) == (limit == "2KB")
    torch.set_num_threads(threads)
    try:
        again = mergerl("merge", tiny, "two", "--recipe", "one/merge.yaml")
    finally:
        torch.set_num_threads(1)
    assert again.code == 0, again.err
    assert digests(Path("one")) == digests(Path("two"))
    recipes = [yaml.safe_load((Path(f) / "merge.yaml").read_text()) for f in ("one", "two")]
    assert recipes[0] == recipes[1]


def test_a_recipe_remembers_what_was_frozen(tiny: Path, mergerl: Command) -> None:
    how = ("--track", "raw", "--uniform", "--freeze", "emb_", "--freeze", r"\.dec\.")
    ended = mergerl("merge", tiny, "one", *how)
    assert ended.code == 0, ended.err
    assert yaml.safe_load(Path("one/merge.yaml").read_text())["frozen"] == ["emb_", r"\.dec\."]
    again = mergerl("merge", tiny, "two", "--recipe", "one/merge.yaml")
    assert again.code == 0, again.err
    files = [(Path(f) / "model.safetensors").read_bytes() for f in ("one", "two")]
    assert files[0] == files[1]
    newest, merged = mrl.open_checkpoints(tiny), open_model_file("one").weights
    last = newest.read(newest.names.index("tiny-0000400"))
    for name in last:
        if "emb_" in name or ".dec." in name:
            assert torch.equal(merged[name], last[name].float()), name


def test_the_recipe_of_a_search_makes_its_file(
    tiny: Path, mergerl: Command, tiny_config: Any, tmp_path: Path
) -> None:
    config = tiny_config(tiny, merge={"groups": {"decoder": r"\.dec\."}})
    result = mrl.optimize(tiny, out=tmp_path / "run", config=config)
    recipe = result.run_dir / "merged/merge.yaml"
    ended = mergerl("merge", tiny, "again", "--recipe", recipe)
    assert ended.code == 0, ended.err
    assert digests(Path("again")) == digests(result.run_dir / "merged")


def test_the_file_says_where_it_comes_from(tiny: Path, mergerl: Command) -> None:
    assert mergerl("merge", tiny, "out", "--uniform", "--track", "raw").code == 0
    metadata = open_model_file("out").metadata
    assert all(isinstance(value, str) for value in metadata.values())
    assert metadata["format"] == "pt"
    assert metadata["tool"] == f"merge_rl {mrl.__version__}"
    merge = json.loads(metadata["merge"])
    opened = open_checkpoints(tiny, track="raw")
    assert [s["sha256"] for s in merge["sources"]] == [opened.sha256(i) for i in range(4)]
    assert [s["coefficients"] for s in merge["sources"]] == [[0.25]] * 4
    card = Path("out/README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "mit"
    assert header["tags"] == ["merge", "diffusion", "edm2", "merge_rl"]
    assert "The plain average." in card


def test_several_profiles_in_one_pass(
    tiny: Path, mergerl: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = mergerl("merge", tiny, "grid", "--ema-std", "0.06,0.08,0.1", "--dtype", "float16")
    assert ended.code == 0, ended.err
    opened = open_checkpoints("grid")
    assert opened.names == tuple(f"phema-0000409-{s:.3f}" for s in (0.06, 0.08, 0.1))
    assert opened.nimg == [409600] * 3
    assert opened.ema_std == [0.06, 0.08, 0.1]
    assert opened.licence == "MIT"
    assert all(check.ok and check.recorded for check in opened.verify())
    # Each is what it is alone.
    assert mergerl("merge", tiny, "alone", "--ema-std", "0.08", "--dtype", "float16").code == 0
    alone = open_model_file("alone").weights
    for name, tensor in opened.read(1).items():
        assert torch.equal(tensor, alone[name])
    merge = json.loads(opened.metadata(1)["merge"])
    assert len(merge["sources"]) == 4
    listed = mergerl("merge", tiny, "grid2", "--ema-std", "0.060,0.065,...,0.080", "--json")
    assert len(json.loads(listed.out)["checkpoints"]) == 5


def test_profiles_need_three_decimals(tiny: Path, mergerl: Command) -> None:
    ended = mergerl("merge", tiny, "grid", "--ema-std", "0.0601,0.0602")
    assert ended.code == 1
    assert "differ in their three decimals" in ended.err
    assert not Path("grid").exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500MB", 500_000_000),
        ("5gb", 5 * 10**9),
        ("2GiB", 2**31),
        ("1.5 kB", 1500),
        ("7", 7),
        ("1e9", 10**9),
        ("100k", 100_000),
        ("2 Mi", 2**21),
        ("3TB", 3 * 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5 apples", "-1GB", "0", "GB", "inf", "5BB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a size such as 500MB or 5GB"):
        parse_size(text)
