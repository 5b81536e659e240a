"""`mergerl reference`, and what `inspect` and `evaluate` make of its files and of images."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from merge_rl.storage.files.images import write_png
from merge_rl.workflows.reference.file import load_reference


class Ended(NamedTuple):
    """How a command ended, as the fixture `mergerl` gives it."""

    code: int
    out: str
    err: str


Mergerl = Callable[..., Ended]
COUNT = 24


@pytest.fixture
def images(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (COUNT, 1, 8, 8), generator=generator, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        write_png(tmp_path / f"images/img_{i}.png", image)
    return tmp_path / "images"


@pytest.fixture
def digits(shared_tiny: Path) -> list[object]:
    weights = shared_tiny / "evaluation/extractor.safetensors"
    return ["--extractor", "digits", "--extractor-weights", weights]


def test_names_that_are_no_text_of_the_terminal_or_at_all(
    images: Path, digits: list[object], mergerl: Mergerl, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    odd = images.rename(tmp_path / f"é{os.fsdecode(bytes([255]))}")
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", plain)
    out = odd / "é.safetensors"
    code, _, err = mergerl("reference", odd, "--out", out, *digits)
    assert code == 0, err
    plain.seek(0)
    assert r"\xe9.safetensors" in plain.read()
    assert load_reference(out).source == "é?"


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_nobody_has_to_listen(
    closed: str, images: Path, digits: list[object], mergerl: Mergerl, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "a.safetensors"
    monkeypatch.setattr(sys, closed, None)  # as after >&- or 2>&-
    assert mergerl("reference", images, "--out", out, "--json", *digits).code == 0
    getattr(sys, closed).close()
    assert load_reference(out).count == COUNT


def test_from_a_folder_to_scores(
    images: Path, digits: list[object], tiny: Path, mergerl: Mergerl, tmp_path: Path
) -> None:
    out = tmp_path / "real.safetensors"
    code, text, err = mergerl("reference", images, "--out", out, "--keep-features", *digits)
    assert code == 0, err
    assert "64 features of digits, 8 x 8" in text
    assert f" {COUNT} {COUNT}" in " ".join(text.replace("│", "").split())
    assert "reference (24 images)" in err
    assert "24 images for 64 features: the covariance is singular" in err

    model = tiny / "raw/tiny-0000400.safetensors"
    code, text, err = mergerl(
        "evaluate", model, "--reference", out, "--num-images", 20, "--metrics", "fid,kid,prdc",
        "--save-features", "features",
    )  # fmt: skip
    assert code == 0, err
    assert "N = 20, 3 repeats, seed 0, heun with 2 steps" in text
    for score in ("fid", "kid", "precision", "recall", "density", "coverage"):
        assert f" {score}, reference " in text

    # The features of one block, and the images themselves, are scored by the same command.
    kept = tmp_path / "features/ode-seed0-1-20.safetensors"
    code, text, _ = mergerl("evaluate", kept, "--reference", out, "--json")
    assert code == 0
    block = json.loads(text)
    code, text, _ = mergerl(
        "evaluate", model, "--reference", out, "--num-images", 20, "--save-features", "features",
        "--json",
    )  # fmt: skip
    assert json.loads(text)["fid"]["reference"]["values"][1] == block["fid"]["reference"]["mean"]
    code, text, err = mergerl("evaluate", images, "--reference", out, *digits[2:])
    assert code == 0, err
    assert "N = 24, 1 block" in text
    assert "│ fid, reference │" in text
    assert "0.000000" in text  # the reference's own images
    assert "one block of images: no interval" in err


def test_halves_as_json(
    images: Path, digits: list[object], mergerl: Mergerl, tmp_path: Path
) -> None:
    code, out, err = mergerl(
        "reference", images, "--out", "r.safetensors", "--split", "--limit", 10, "--seed", 3,
        "--max-features", 2, "--keep-features", "--json", *digits,
    )  # fmt: skip
    assert code == 0, err
    document = json.loads(out)
    assert [file["images"] for file in document["files"]] == [5, 5]
    assert [file["features_kept"] for file in document["files"]] == [2, 2]
    assert [load_reference(tmp_path / file["out"]).count for file in document["files"]] == [5, 5]


def test_inspect_knows_every_format(
    golden: Path, shared_tiny: Path, mergerl: Mergerl, tmp_path: Path
) -> None:
    own = shared_tiny / "evaluation/reference.safetensors"
    document = json.loads(mergerl("inspect", own, "--json").out)
    assert (document["kind"], document["extractor"], document["count"]) == (
        "reference", "digits", 200,
    )  # fmt: skip
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), sigma=np.eye(3))
    document = json.loads(mergerl("inspect", "a.npz", "--json").out)
    assert (document["dimensions"], document["count"]) == (3, None)
    assert "number of images is not recorded" in document["note"]
    edm2 = golden / "edm2/dataset_ref/tiny_ref.pkl"
    document = json.loads(mergerl("inspect", edm2, "--json").out)
    assert [entry["entry"] for entry in document["entries"]] == ["fid", "fd_dinov2"]
    document = json.loads(mergerl("inspect", f"{edm2}#fid", "--json").out)
    assert (document["extractor"], document["dimensions"]) == ("inception-tf1", 8)
    code, out, _ = mergerl("inspect", edm2)
    assert code == 0
    assert out.count("│ extractor") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reference", "nowhere", "--out", "r.safetensors"], "nowhere: no such file or folder"),
        (["reference", "images", "--out", "r.npz"], "that ends in .safetensors, got 'r.npz'"),
        (["reference", "images", "--out", "r.safetensors", "--balanced"], "subsets need labels"),
        (["reference", "images/img_0.png", "--out", "r.safetensors"], "found a file with the endi"),
        (["reference", "mixed", "--out", "r.safetensors"],
         r"mixed: b.png is 8x9 grey, expected 8x8 grey as a.png; images of one size and mode"),
        (["evaluate", "mixed", "--reference", "tiny/evaluation/reference.safetensors"],
         r"b.png is 8x9 grey, expected 8x8 grey as a.png"),
    ],
)  # fmt: skip
def test_refusals(
    arguments: list[object], message: str, images: Path, digits: list[object], tiny: Path,
    mergerl: Mergerl, tmp_path: Path,
) -> None:  # fmt: skip
    write_png(tmp_path / "mixed/a.png", torch.zeros(1, 8, 8, dtype=torch.uint8))
    write_png(tmp_path / "mixed/b.png", torch.zeros(1, 9, 8, dtype=torch.uint8))
    before = sorted(tmp_path.rglob("*"))
    code, out, err = mergerl(*arguments, *digits)
    assert (code, out) == (1, "")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert sorted(tmp_path.rglob("*")) == before


def test_pairs_need_kept_features(tiny: Path, mergerl: Mergerl) -> None:
    model = tiny / "raw/tiny-0000400.safetensors"
    code, _, err = mergerl("evaluate", model, "--metrics", "fid,kid", "--num-images", 10)
    assert code == 1
    assert "make them with `mergerl reference --keep-features`" in err


def test_both_samplers(tiny: Path, mergerl: Mergerl) -> None:
    model = tiny / "raw/tiny-0000400.safetensors"
    arguments = ["evaluate", model, "--num-images", 10, "--set", "sampler.sde_num_steps=3"]
    code, out, err = mergerl(*arguments, "--under", "both")
    assert code == 0, err
    assert "seed 0, heun with 2 steps" in out
    assert "seed 0, sde-euler with 3 steps" in out
    document = json.loads(mergerl(*arguments, "--solver", "sde-heun", "--json").out)
    assert (document["sampler"]["solver"], document["sampler"]["num_steps"]) == ("sde-heun", 2)
    code, _, err = mergerl(*arguments, "--under", "odes")
    assert code == 1
    assert "unknown sampler 'odes'; did you mean 'ode'" in err
