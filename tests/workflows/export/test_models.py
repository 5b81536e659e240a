"""Merging once and loading models: the short ways of the public API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import merge_rl as mrl
from merge_rl.core.merging.ema_profiles import posthoc_coefficients
from merge_rl.errors import (
    CheckpointError,
    ConfigError,
    HashMismatchError,
    NonFiniteWeightsError,
    UnknownNameError,
)
from merge_rl.storage.checkpoints.checkpoint_set import CheckpointSet
from merge_rl.storage.checkpoints.manifest import MANIFEST_NAME
from merge_rl.storage.files.atomic import save_tensors
from merge_rl.workflows.export.profiles import ema_coefficients

RAW = ("tiny-0000100", "tiny-0000200", "tiny-0000300", "tiny-0000400")


@pytest.fixture
def raw(shared_tiny: Path) -> CheckpointSet:
    return mrl.open_checkpoints(shared_tiny, track="raw")


def weighted_sum(opened: CheckpointSet, row: list[float], name: str) -> Tensor:
    total = torch.zeros(opened.tensors[name].shape, dtype=torch.float64)
    for index, coefficient in enumerate(row):
        total += coefficient * opened.read(index)[name].double()
    return total


# --------------------------------------------------------------------------------------- merging


def test_a_merge_is_the_weighted_sum(raw: CheckpointSet) -> None:
    row = [0.5, -0.25, 0.0, 1.25]
    weights = mrl.merge(raw, row)
    assert list(weights) == list(raw.tensors)
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float32
        if "fourier" not in name:
            expected = weighted_sum(raw, row, name)
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("index", range(4))
def test_one_checkpoint_alone_is_itself(index: int, raw: CheckpointSet) -> None:
    weights = mrl.merge(raw, torch.eye(4)[index], base=RAW[index])
    for name, tensor in raw.read(index).items():
        assert torch.equal(weights[name], tensor.float()), name


def test_buffers_are_carried_from_the_base(tiny: Path) -> None:
    # Frequencies that differ between checkpoints must not be averaged into others.
    name, path = "unet.emb_fourier.freqs", tiny / "raw/tiny-0000200.safetensors"
    changed = mrl.open_checkpoints(tiny, select=[RAW[1]]).read(0)
    save_tensors(path, {**changed, name: changed[name] + 1})
    manifest = tiny / MANIFEST_NAME
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(line for line in lines if "sha256" not in line))
    opened = mrl.open_checkpoints(tiny, track="raw")
    for base, expected in ((RAW[1], changed[name] + 1), ("newest", changed[name])):
        assert torch.equal(mrl.merge(opened, [0.25] * 4, base=base)[name], expected.float())


def test_groups_have_rows_of_their_own(raw: CheckpointSet) -> None:
    rows = [[1.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0]]
    weights = mrl.merge(raw, rows, groups={"encoder": r"\.enc\."})
    for name, tensor in weights.items():
        if "fourier" not in name:
            expected = weighted_sum(raw, rows[0] if ".enc." in name else rows[1], name)
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ([0.5, 0.5], r"expected coefficients \(1, 4\), got \(1, 2\)"),
        ([[1.0, 0, 0, 0]] * 2, r"expected coefficients \(1, 4\), got \(2, 4\)"),
        ([1.0, float("nan"), 0, 0], "expected finite coefficients"),
        ([1.0, float("inf"), 0, 0], "expected finite coefficients"),
        ("0.5,0.5", "expected coefficients as numbers, got '0.5,0.5'"),
        ({"a": 1}, "expected coefficients as numbers, got {'a': 1}"),
    ],
)
def test_coefficients_that_do_not_fit(coefficients: Any, message: str, raw: CheckpointSet) -> None:
    with pytest.raises(ConfigError, match=message):
        mrl.merge(raw, coefficients)


def test_an_unknown_base_is_refused(raw: CheckpointSet) -> None:
    with pytest.raises(UnknownNameError, match="'tiny-0000201'; did you mean 'tiny-0000200'"):
        mrl.merge(raw, [0.25] * 4, base="tiny-0000201")


def test_spoilt_checkpoints_are_not_merged(tiny: Path) -> None:
    path = tiny / "raw/tiny-0000300.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(HashMismatchError, match=r"tiny-0000300\.safetensors: SHA-256 is"):
        mrl.merge(mrl.open_checkpoints(tiny, track="raw"), [0.25] * 4)


# --------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_saved_models_load_as_they_were(dtype: str, raw: CheckpointSet, tmp_path: Path) -> None:
    weights = mrl.merge(raw, [0.1, 0.2, 0.3, 0.4])
    out = mrl.save_model(tmp_path / "out", weights, raw.config, dtype=dtype)
    model = mrl.load_model(out)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    state = model.state_dict()
    assert set(state) == set(weights)
    for name, tensor in weights.items():
        assert state[name].dtype == torch.float32
        expected = tensor.to(getattr(torch, dtype)).float()
        assert torch.equal(state[name], expected), name
    same = mrl.load_model(out / "model.safetensors").state_dict()
    assert all(torch.equal(same[name], state[name]) for name in state)


def test_one_file_of_a_set_is_a_model(shared_tiny: Path, raw: CheckpointSet) -> None:
    model = mrl.load_model(shared_tiny / "raw/tiny-0000100.safetensors")
    for name, tensor in raw.read(0).items():
        assert torch.equal(model.state_dict()[name], tensor.float())
    x = torch.ones(2, 1, 8, 8)
    assert bool(model(x, torch.tensor(1.0), torch.tensor([0, 1])).isfinite().all())


def test_what_is_no_model(tiny: Path, tmp_path: Path, raw: CheckpointSet) -> None:
    with pytest.raises(CheckpointError, match="a model, a set or a run, found 3 .safetensors"):
        mrl.load_model(tiny / "evaluation")
    with pytest.raises(CheckpointError, match="nowhere: no such file or folder"):
        mrl.load_model(tmp_path / "nowhere")
    (tmp_path / "a.pkl").write_bytes(b"")
    with pytest.raises(CheckpointError, match="`mergerl convert` makes one"):
        mrl.load_model(tmp_path / "a.pkl")
    save_tensors(tmp_path / "bare.safetensors", raw.read(0))
    with pytest.raises(CheckpointError, match="model config is not known; expected a config.json"):
        mrl.load_model(tmp_path / "bare.safetensors")
    refused = {
        "unet.out_gain": (torch.ones(1), r"found float32 \[1\], expected a floating type \[\]"),
        "unet.emb_noise.weight": (torch.ones(8, 8).short(), "found int16 .*, expected a floating"),
    }
    for name, (odd, said) in refused.items():
        weights = {**raw.read(0), name: odd}
        place = mrl.save_model(tmp_path / name, weights, raw.config)
        with pytest.raises(CheckpointError, match=f"1 differ, first {name!r}: {said}"):
            mrl.load_model(place)
    lacking = {name: t.float() for name, t in raw.read(0).items() if name != "unet.out_gain"}
    out = mrl.save_model(tmp_path / "out", lacking, raw.config)
    with pytest.raises(CheckpointError, match="1 differ, first 'unet.out_gain': found missing"):
        mrl.load_model(out)


def test_weights_that_are_not_finite_are_not_loaded(tmp_path: Path, raw: CheckpointSet) -> None:
    weights = {name: tensor.float() for name, tensor in raw.read(0).items()}
    out = mrl.save_model(tmp_path / "out", weights, raw.config)
    weights["unet.out_gain"] = torch.tensor(float("nan"))
    save_tensors(out / "model.safetensors", weights)
    with pytest.raises(NonFiniteWeightsError, match="'unet.out_gain' holds NaN"):
        mrl.load_model(out)


# ----------------------------------------------------------------------------------- EMA profiles


def test_ema_coefficients_are_the_posthoc_ones(shared_tiny: Path) -> None:
    opened = mrl.open_checkpoints(shared_tiny, track="ema")
    # Two widths at 200 and two at 400 times 1024 images.
    times, widths = [204800.0] * 2 + [409600.0] * 2, [0.05, 0.1] * 2
    found = ema_coefficients(opened, 0.07)
    expected = posthoc_coefficients(times, widths, [409600.0], [0.07])[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert float(found.sum()) == pytest.approx(1)
    # A profile that ends before the newest does not see it.
    early = ema_coefficients(opened, 0.07, nimg=300000)
    seen = posthoc_coefficients(times[:2], widths[:2], [300000.0], [0.07])[:, 0]
    assert early.tolist() == [*seen.tolist(), 0.0, 0.0]


@pytest.mark.parametrize(("index", "std"), [(2, 0.05), (3, 0.1)])
def test_a_profile_that_was_saved_is_itself(index: int, std: float, shared_tiny: Path) -> None:
    opened = mrl.open_checkpoints(shared_tiny, track="ema")
    assert ema_coefficients(opened, std).tolist() == torch.eye(4)[index].tolist()


def test_ema_profiles_that_cannot_be(shared_tiny: Path, raw: CheckpointSet) -> None:
    opened = mrl.open_checkpoints(shared_tiny, track="ema")
    with pytest.raises(ConfigError, match=r"'tiny-0000100' and 3 more have none.*--track"):
        ema_coefficients(raw, 0.1)
    with pytest.raises(ConfigError, match="no checkpoint ends at or before 5 images"):
        ema_coefficients(opened, 0.1, nimg=5)
    with pytest.raises(ConfigError, match=r"expected 1e-07 <= ema_std < 0\.288675.*got \[0\.4\]"):
        ema_coefficients(opened, 0.4)
