"""`mergerl convert`: what it writes, prints and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import merge_rl as mrl
from tests.fixtures import TINY_MODEL
from tests.snapshots import write_sit, write_snapshot

Command = Callable[..., Any]
KWARGS = {key: value for key, value in TINY_MODEL.items() if key != "model"}


@pytest.fixture
def snapshots(shared_tiny: Path, tmp_path: Path) -> Path:
    """The checkpoints of the tiny set as EDM2 snapshots."""
    folder = tmp_path / "snapshots"
    folder.mkdir()
    opened = mrl.open_checkpoints(shared_tiny, track="ema")
    for i, name in enumerate(opened.names):
        write_snapshot(folder / f"{name}.pkl", opened.read(i), KWARGS, encoder="rgb")
    return folder


def test_a_folder_becomes_a_set(snapshots: Path, shared_tiny: Path, mergerl: Command) -> None:
    ended = mergerl("convert", snapshots, "ckpts", "--name", "mine", "--license", "MIT")
    assert ended.code == 0, ended.err
    assert "ckpts: 4 written, 0 kept" in ended.out
    assert ended.out.splitlines()[-1] == "next: mergerl inspect ckpts"
    assert "tiny-0000200-0.050" in ended.out
    assert "200,704" in ended.out
    assert "convert (65.2 kB)" in ended.err
    opened, first = mrl.open_checkpoints("ckpts"), mrl.open_checkpoints(shared_tiny, track="ema")
    assert (opened.names, opened.ema_std) == (first.names, first.ema_std)
    assert opened.nimg == [200_704, 200_704, 400_384, 400_384]
    assert opened.config == TINY_MODEL
    for i in range(4):
        ours, theirs = opened.read(i), first.read(i)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # The other commands take it from here.
    inspected = mergerl("inspect", "ckpts", "--json")
    assert inspected.code == 0, inspected.err
    assert json.loads(inspected.out)["licence"] == "MIT"
    assert mergerl("merge", "ckpts", "merged", "--uniform").code == 0
    mrl.load_model("merged")


def test_a_second_time_keeps_what_is_there(snapshots: Path, mergerl: Command) -> None:
    files = sorted(snapshots.iterdir())
    assert mergerl("convert", *files[:3], "ckpts").code == 0
    ended = mergerl("convert", *files, "ckpts", "--json", "--workers", 2, "--delete-source")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    assert [row["status"] for row in document["checkpoints"]] == ["kept", "kept", "kept", "new"]
    assert document["checkpoints"][0]["nimg"] == 200_704
    assert document["model"] == TINY_MODEL
    assert document["deleted"] == [str(file) for file in files]
    assert list(snapshots.iterdir()) == []
    assert ended.err == ""


def test_options_reach_the_conversion(golden: Path, tmp_path: Path, mergerl: Command) -> None:
    model = mrl.open_checkpoints(golden / "sit/tiny", select=["a.weights"]).read(0)
    write_sit(tmp_path / "0000100.pt", model, {k: v + 1 for k, v in model.items()})
    asked = mergerl("convert", tmp_path / "0000100.pt", "ckpts")
    assert asked.code == 1
    assert "sit and dit have these tensors" in asked.err
    refused = mergerl("convert", tmp_path / "0000100.pt", "ckpts", "--family", "sit")
    assert refused.code == 1
    assert "pass num_heads" in refused.err
    ended = mergerl(
        "convert", "0000100.pt", "ckpts", "--weights", "both", "--num-heads", 4, "--family", "sit"
    )
    assert ended.code == 0, ended.err
    assert mrl.open_checkpoints("ckpts").tracks == ["raw", "ema"]


def test_refusals_are_one_sentence(snapshots: Path, tmp_path: Path, mergerl: Command) -> None:
    (tmp_path / "bad.pkl").write_bytes(b"cos\nsystem\n(X\x04\x00\x00\x00truetR.")
    cases = [
        ((snapshots,), "expected what to convert and the folder to write to: SRC... DIR"),
        (("bad.pkl", "out"), "bad.pkl: refers to 'os.system', which is not among the names"),
        (("missing", "out"), "missing: no such file or folder"),
        (
            ("https://hf.co/user/repo/tree/main", "out"),
            "https://hf.co/user/repo/tree/main: an address, expected a file or folder, or the "
            "repository's name: user/repo",
        ),
        (("s3://a/b.pt", "out"), "s3://a/b.pt: an address, expected a file or folder: download it"),
        (("~/missing", "out"), f"{Path.home()}/missing: no such"),
        (
            (snapshots, "out", "--weights", "raw"),
            "unknown weights 'raw' (known: auto, both, ema, model)",
        ),
        ((snapshots, "out", "--workers", 0), "expected workers >= 1, got 0"),
    ]
    for arguments, message in cases:
        ended = mergerl("convert", *arguments)
        assert (ended.code, ended.out) == (1, "")
        assert ended.err.startswith(f"error: {message}"), ended.err
        assert ended.err.count("\n") == 1
        assert not Path("out").exists()


def test_help_teaches(mergerl: Command) -> None:
    text = mergerl("convert", "--help").out
    for word in ("--delete-source", "--license", "--num-heads", "training-state-*.pt", "inspect"):
        assert word in text
