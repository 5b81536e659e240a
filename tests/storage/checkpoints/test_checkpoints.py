"""Checkpoint sets: lazy opening, order, and one clear sentence for each kind of bad file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from merge_rl.errors import (
    CheckpointError,
    HashMismatchError,
    IncompatibleCheckpointError,
    ManifestError,
    NonFiniteWeightsError,
    UnknownNameError,
)
from merge_rl.storage.checkpoints.checkpoint_set import CheckpointSet, open_checkpoints
from merge_rl.storage.checkpoints.listing import newest_model
from merge_rl.storage.checkpoints.manifest import (
    MANIFEST_NAME,
    CheckpointEntry,
    Manifest,
    SetDefaults,
    write_manifest,
)
from merge_rl.storage.checkpoints.model_file import open_model_file, save_checkpoint
from merge_rl.storage.files.atomic import save_tensors, write_json
from merge_rl.storage.files.safetensors_header import TensorInfo

CONFIG = {"model": "edm2", "img_resolution": 8}


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer.weight": torch.randn(3, 2, generator=generator).half(),
        "layer.gain": torch.randn((), generator=generator),
        "steps": torch.tensor([seed]),
    }


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three checkpoints with official names, no manifest."""
    for seed, name in enumerate(["net-0008388-0.050", "net-0008388-0.100", "net-0016777-0.050"]):
        save_tensors(tmp_path / f"{name}.safetensors", weights(seed))
    return tmp_path


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Two tracks with a manifest, listed out of order, one stem occurring twice."""
    rows = [("raw/b", 2048, None, "raw"), ("raw/a", 1024, None, "raw"), ("ema/b", 2048, 0.1, "ema")]
    for seed, (name, *_) in enumerate(rows):
        save_checkpoint(tmp_path / f"{name}.safetensors", weights(seed))
    entries = tuple(
        CheckpointEntry(
            file=f"{name}.safetensors",
            nimg=nimg,
            ema_std=std,
            track=track,
            sha256=digest(tmp_path / f"{name}.safetensors"),
            licence="MIT" if track == "ema" else None,
        )
        for name, nimg, std, track in rows
    )
    defaults = SetDefaults(extractor="digits", reference=Path("evaluation/reference.npz"))
    manifest = Manifest(model=CONFIG, licence="Apache-2.0", defaults=defaults, checkpoints=entries)
    write_manifest(tmp_path / MANIFEST_NAME, manifest)
    return tmp_path


# --- opening -------------------------------------------------------------------------------------


def test_names_tell_progress_and_width(folder: Path) -> None:
    opened = open_checkpoints(folder)
    assert len(opened) == 3
    assert opened.names == ("net-0008388-0.050", "net-0008388-0.100", "net-0016777-0.050")
    # 8388 and 16777 thousand stand for 8 and 16 times 2^20.
    assert opened.nimg == [8 * 2**20, 8 * 2**20, 16 * 2**20]
    assert opened.ema_std == [0.05, 0.1, 0.05]
    assert opened.newest == 2
    assert opened.config is None
    assert opened.manifest is None
    assert opened.licence is None
    assert opened.defaults == SetDefaults()


@pytest.mark.parametrize(
    ("stem", "nimg", "ema_std"),
    [
        ("a-2147483", 2147483648, None),
        ("edm2-img512-xxl-0939524-0.015", 939524096, 0.015),
        ("a-0000000-0.050", 0, 0.05),
        ("a-123456", None, None),
        ("a-0008388-0.500", None, None),
        ("0008388-0.050", None, None),
        ("a-0008388-0.050-b", None, None),
    ],
)
def test_progress_in_names(
    tmp_path: Path, stem: str, nimg: int | None, ema_std: float | None
) -> None:
    save_tensors(tmp_path / f"{stem}.safetensors", weights())
    opened = open_checkpoints(tmp_path)
    assert (opened.nimg, opened.ema_std) == ([nimg], [ema_std])


def test_a_manifest_orders_by_progress_and_width(listed: Path) -> None:
    opened = open_checkpoints(listed)
    assert opened.names == ("a", "raw/b", "ema/b")
    assert opened.nimg == [1024, 2048, 2048]
    assert opened.ema_std == [None, None, 0.1]
    assert opened.newest == 2
    assert opened.tracks == ["raw", "ema"]
    assert opened.config == CONFIG
    assert opened.licence == "Apache-2.0, MIT"
    assert opened.defaults.reference == listed / "evaluation/reference.npz"
    assert opened.paths[0] == listed / "raw/a.safetensors"
    assert opened.total_bytes == sum(path.stat().st_size for path in opened.paths)


def test_one_unknown_progress_keeps_the_order_of_the_manifest(tmp_path: Path) -> None:
    for seed, name in enumerate("cab"):
        save_tensors(tmp_path / f"{name}.safetensors", weights(seed))
    entries = tuple(
        CheckpointEntry(file=f"{name}.safetensors", nimg=nimg)
        for name, nimg in [("c", 3072), ("a", None), ("b", 1024)]
    )
    write_manifest(tmp_path / MANIFEST_NAME, Manifest(model=CONFIG, checkpoints=entries))
    opened = open_checkpoints(tmp_path)
    assert opened.names == ("c", "a", "b")
    assert opened.newest == 2


STEPS = ["step_250", "step_500", "step_750", "step_2000", "step_20000"]


def test_a_set_is_called_by_what_is_its_own(listed: Path, tmp_path: Path) -> None:
    called = open_checkpoints(listed)
    assert called.manifest is not None
    assert called.title == (called.manifest.name or listed.name)
    for folder, title in (("run/checkpoints", "run"), ("a/ckpts", "a"), ("run/raw", "raw")):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("1", "2"):
            save_tensors(tmp_path / folder / f"{name}.safetensors", {"w": torch.zeros(2)})
        assert open_checkpoints(tmp_path / folder).title == title


def test_numbers_in_names_count_as_numbers(tmp_path: Path) -> None:
    for seed, name in enumerate(reversed(STEPS)):
        save_tensors(tmp_path / f"{name}.safetensors", weights(seed))
    opened = open_checkpoints(tmp_path)
    assert opened.names == tuple(STEPS)
    assert opened.names[opened.newest] == "step_20000"
    assert opened.nimg == [None] * 5


@pytest.mark.parametrize("folders", [("",), ("raw/", "ema/")])
def test_a_series_in_a_manifest_goes_by_its_numbers(
    tmp_path: Path, folders: tuple[str, ...]
) -> None:
    # In the order of text, as a list of files was written down.
    files = [f"{place}{name}.safetensors" for name in sorted(STEPS) for place in folders]
    for seed, file in enumerate(files):
        save_checkpoint(tmp_path / file, weights(seed))
    entries = tuple(
        CheckpointEntry(file=file, track=file.partition("/")[0] if "/" in file else None)
        for file in files
    )
    write_manifest(tmp_path / MANIFEST_NAME, Manifest(model=CONFIG, checkpoints=entries))
    opened = open_checkpoints(tmp_path)
    # Of equal numbers the manifest's order is kept.
    expected = [f"{place}{name}" for name in STEPS for place in folders]
    assert [entry.file.removesuffix(".safetensors") for entry in opened.entries] == expected
    track = folders[-1].rstrip("/") or None
    assert newest_model(tmp_path, track).stem == "step_20000"


def test_a_track_or_a_selection_keeps_order_and_names(listed: Path) -> None:
    assert open_checkpoints(listed, track="raw").names == ("a", "raw/b")
    assert open_checkpoints(listed, select=["ema/b", "a"]).names == ("a", "ema/b")
    with pytest.raises(UnknownNameError, match=r"unknown track 'rew'; did you mean 'raw'\?"):
        open_checkpoints(listed, track="rew")
    with pytest.raises(UnknownNameError, match=r"unknown checkpoint 'b'.*known: a, raw/b"):
        open_checkpoints(listed, track="raw", select=["b"])
    with pytest.raises(CheckpointError, match="selection of checkpoints is empty"):
        open_checkpoints(listed, select=[])


def test_a_track_without_a_manifest_is_unknown(folder: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown track 'raw' \(known: none\)"):
        open_checkpoints(folder, track="raw")


def test_the_config_comes_from_the_folder_before_the_first_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.safetensors", weights(), {"config": CONFIG, "note": "x"})
    opened = open_checkpoints(tmp_path)
    assert opened.config == CONFIG
    assert opened.metadata(0)["note"] == "x"
    write_json(tmp_path / "config.json", {"model": "sit"})
    assert open_checkpoints(tmp_path).config == {"model": "sit"}


def test_tensors_are_in_file_order_with_shape_and_type(folder: Path) -> None:
    tensors = open_checkpoints(folder).tensors
    # Eight-byte values first, two-byte ones last, so that all stay aligned.
    assert list(tensors.items()) == [
        ("steps", TensorInfo((1,), "I64")),
        ("layer.gain", TensorInfo((), "F32")),
        ("layer.weight", TensorInfo((3, 2), "F16")),
    ]


def test_opening_reads_headers_only(folder: Path) -> None:
    # NaN in the data shows once the tensor is read, not before.
    spoilt = folder / "net-0008388-0.100.safetensors"
    spoilt.write_bytes(spoilt.read_bytes()[:-2] + b"\xff\xff")
    opened = open_checkpoints(folder)
    assert len(opened.read(0)) == 3
    with pytest.raises(NonFiniteWeightsError):
        opened.read(1)


# --- reading -------------------------------------------------------------------------------------


def test_what_was_saved_is_read_whole_and_in_part(folder: Path) -> None:
    opened = open_checkpoints(folder)
    for index in range(3):
        read = opened.read(index)
        assert list(read) == list(opened.tensors)
        for name, tensor in weights(index).items():
            torch.testing.assert_close(read[name], tensor, rtol=0, atol=0)
            torch.testing.assert_close(opened.read_tensor(index, name), tensor, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match=r"no tensor 'layer\.wait'; did you mean 'layer.weig"):
        opened.read_tensor(0, "layer.wait")


def test_read_tensors_are_the_callers_own(folder: Path) -> None:
    opened = open_checkpoints(folder)
    opened.read(0)["layer.weight"].zero_()
    torch.testing.assert_close(opened.read(0)["layer.weight"], weights(0)["layer.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_nan_and_infinity_are_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    spoilt = torch.ones(4, 3, dtype=dtype)
    spoilt[1, :2] = value
    save_tensors(tmp_path / "a.safetensors", {"fine": torch.ones(2), "w": spoilt})
    opened = open_checkpoints(tmp_path)
    message = r"a\.safetensors: tensor 'w' holds NaN or infinity in 2 of 12 values"
    with pytest.raises(NonFiniteWeightsError, match=message):
        opened.read(0)
    with pytest.raises(NonFiniteWeightsError, match=message):
        opened.read_tensor(0, "w")
    with pytest.raises(NonFiniteWeightsError, match=message):
        open_model_file(tmp_path / "a.safetensors")


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteWeightsError, match="'w' holds NaN or infinity in 1 of 1"):
        save_checkpoint(tmp_path / "a.safetensors", {"w": torch.tensor(float("nan"))})
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_hash_is_refused_with_both_hashes(listed: Path) -> None:
    opened = open_checkpoints(listed)
    expected, path = digest(listed / "raw/a.safetensors"), listed / "raw/a.safetensors"
    assert opened.read(0)["steps"].item() == 1
    save_tensors(path, weights(9))
    with pytest.raises(HashMismatchError, match=f"{digest(path)}.*{expected}"):
        opened.read(0)
    with pytest.raises(HashMismatchError, match=expected):
        open_model_file(path)


def test_a_hash_is_computed_once_and_again_after_a_change(
    listed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, steps = open_checkpoints(listed), []
    first = opened.sha256(0, lambda done, total: steps.append((done, total)))
    size = opened.paths[0].stat().st_size
    assert first == digest(opened.paths[0])
    assert steps == [(size, size)]
    calls: list[bool] = []
    monkeypatch.setattr("merge_rl.storage.files.stored.sha256_file", lambda *_: calls.append(True))
    assert opened.sha256(0) == first
    assert calls == []


def test_a_file_that_changes_its_layout_after_opening_is_refused(folder: Path) -> None:
    opened = open_checkpoints(folder)
    save_tensors(opened.paths[0], {"other": torch.ones(2)})
    with pytest.raises(CheckpointError, match="has changed since the set was opened"):
        opened.read(0)
    opened.paths[1].unlink()
    with pytest.raises(CheckpointError, match=r"0\.100\.safetensors: cannot be read: No such file"):
        opened.read(1)
    opened.paths[2].write_bytes(b"short")
    with pytest.raises(CheckpointError, match="became shorter"):
        opened.read_tensor(2, "steps")


def test_verify_reports_every_file(listed: Path) -> None:
    opened = open_checkpoints(listed)
    assert all(check.ok and check.recorded for check in opened.verify())
    save_tensors(listed / "raw/b.safetensors", weights(7))
    (listed / "ema/b.safetensors").unlink()
    checks = list(opened.verify())
    assert [check.name for check in checks] == ["a", "raw/b", "ema/b"]
    assert [check.ok for check in checks] == [True, False, False]
    assert checks[0].sha256 == digest(listed / "raw/a.safetensors")
    assert isinstance(checks[1].error, HashMismatchError)
    assert checks[2].sha256 is None


# --- files that do not fit -----------------------------------------------------------------------


def test_folders_that_hold_no_set(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        open_checkpoints(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no \.safetensors files$"):
        open_checkpoints(tmp_path)
    (tmp_path / "a.pkl").write_bytes(b"")
    with pytest.raises(CheckpointError, match="`mergerl convert` makes them from the 1 .pkl"):
        open_checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="expected a folder of checkpoints, found a file"):
        open_checkpoints(tmp_path / "a.pkl")


def test_unfinished_writes_are_no_checkpoints(folder: Path) -> None:
    (folder / ".tmp-1-a.safetensors").write_bytes(b"half")
    assert len(open_checkpoints(folder)) == 3


def test_letters_of_either_case_end_a_name(folder: Path) -> None:
    names = open_checkpoints(folder).names
    first = next(file for file in sorted(folder.glob("*.safetensors")))
    first.rename(first.with_suffix(".SAFETENSORS"))
    assert open_checkpoints(folder).names == names
    assert open_checkpoints(folder).paths[0].suffix == ".SAFETENSORS"


def test_a_listed_file_must_exist(listed: Path) -> None:
    (listed / "raw/a.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"raw/a\.safetensors: listed in .* no such file"):
        open_checkpoints(listed)


def changed(name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    tensors = {**weights(), **({} if tensor is None else {name: tensor})}
    return tensors if tensor is not None else {k: v for k, v in tensors.items() if k != name}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (changed("steps", None), r"'steps' is missing, expected int64 \[1\] as in net-0008388"),
        (changed("more", torch.ones(2)), r"'more' is float32 \[2\], expected no such tensor as in"),
        (changed("steps", torch.tensor([1, 2])), r"'steps' is int64 \[2\], expected int64 \[1\]"),
        (
            changed("layer.gain", torch.ones(()).half()),
            r"'layer.gain' is float16 \[\], expected float32 \[\]",
        ),
        ({"x": torch.ones(1)}, r"'steps' is missing, .*; 3 more tensors differ$"),
    ],
)
def test_a_file_of_another_network_is_refused(
    folder: Path, tensors: Mapping[str, Tensor], message: str
) -> None:
    save_tensors(folder / "other.safetensors", tensors)
    with pytest.raises(IncompatibleCheckpointError, match=r"other\.safetensors: tensor " + message):
        open_checkpoints(folder)


def test_a_file_without_tensors_is_no_checkpoint(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", {}, {"k": "v"})
    with pytest.raises(CheckpointError, match="holds no tensors"):
        open_checkpoints(tmp_path)


@pytest.mark.parametrize("name", ["../a", "/tmp/a"])
def test_a_manifest_cannot_point_outside(tmp_path: Path, name: str) -> None:
    text = f"version: 1\nmodel: {{model: x}}\ncheckpoints: [{{file: {name}.safetensors}}]\n"
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(ManifestError, match="expected a path"):
        open_checkpoints(tmp_path)


def test_a_link_to_itself_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "raw").symlink_to(tmp_path / "raw")
    text = "version: 1\nmodel: {model: x}\ncheckpoints: [{file: raw/a.safetensors}]\n"
    (tmp_path / MANIFEST_NAME).write_text(text)
    # What Python makes of such a link depends on its version; a set it never is.
    with pytest.raises(CheckpointError, match=r"raw/a\.safetensors"):
        open_checkpoints(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not readable JSON"), ("[1]", "expected a JSON object"), ("[" * 10**5, "too deeply")],
)
def test_a_malformed_config_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        open_checkpoints(folder)


def test_a_set_says_what_it_is(folder: Path) -> None:
    opened = open_checkpoints(folder)
    assert isinstance(opened, CheckpointSet)
    assert repr(opened) == f"CheckpointSet({str(folder)!r}, 3 checkpoints)"
