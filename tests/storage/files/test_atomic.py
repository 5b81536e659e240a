"""Atomic writes leave the old file or the new one, and nothing else."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from merge_rl.errors import CheckpointError, ConfigError
from merge_rl.storage.files.atomic import (
    atomic_path,
    counts_of,
    save_tensors,
    write_json,
    write_text,
    write_yaml,
)


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def spoil(target: Path, error: type[BaseException]) -> None:
    with atomic_path(target) as temporary:
        temporary.write_text("half of the ne")
        raise error


def test_the_file_appears_on_leaving_the_block(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.npz"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.suffix == ".npz"
        temporary.write_text("done")
        assert not target.exists()
    assert target.read_text() == "done"
    assert names_in(target.parent) == ["a.npz"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_keeps_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with pytest.raises(error):
        spoil(target, error)
    assert target.read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


def test_file_and_folder_reach_the_disk_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    def record(descriptor: int) -> None:
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append(f"{'folder' if folder else 'file'} {(tmp_path / 'a').exists()}")

    monkeypatch.setattr(os, "fsync", record)
    write_text(tmp_path / "a", "x")
    assert synced == ["file False", "folder True"]


def test_a_folder_that_cannot_be_synced_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError("not supported")

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"


def test_a_folder_in_the_place_of_a_file_is_named_and_stays(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    target.mkdir()
    with pytest.raises(OSError, match="cannot be written: Is a directory") as told:
        write_json(target, {})
    assert told.value.filename == str(target)
    assert names_in(tmp_path) == ["result.json"]


def test_text_json_and_yaml_read_back(tmp_path: Path) -> None:
    value = {"name": "Fréchet", "items": [1, 2.5, None, True], "b": {"a": "0.1"}}
    write_json(tmp_path / "a.json", value)
    write_yaml(tmp_path / "a.yaml", value)
    write_text(tmp_path / "a.txt", "one\r\ntwo é\n")
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == value
    loaded = yaml.safe_load((tmp_path / "a.yaml").read_text("utf-8"))
    assert loaded == value
    assert list(loaded) == ["name", "items", "b"]
    assert (tmp_path / "a.txt").read_bytes() == "one\r\ntwo é\n".encode()


NO_TEXT = os.fsdecode(b"/data/photo\xff")  # the name of a file in an encoding of the last century


def test_names_that_are_no_text_are_written_or_refused(tmp_path: Path) -> None:
    write_text(tmp_path / "a.html", f"<b>{NO_TEXT} é</b>")
    assert (tmp_path / "a.html").read_text("utf-8") == r"<b>/data/photo\udcff é</b>"
    write_json(tmp_path / "a.json", {"of": NO_TEXT})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"of": NO_TEXT}
    save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {"source": NO_TEXT})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"source": "/data/photo?"}
    with pytest.raises(ConfigError, match="/data/photo.: .* holds bytes that are no text; exp"):
        write_yaml(tmp_path / "a.yaml", {"checkpoints": NO_TEXT})
    assert not (tmp_path / "a.yaml").exists()


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"fid": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_tensors_of_any_layout_and_type_read_back_with_the_library(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "half": torch.tensor([1.5, -2.0, 3.0]).half(),
        "transposed": base.T,
        "row of the same memory": base[1],
        "scalar": torch.tensor(-3.25),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False, True]),
        "whole": torch.tensor([2**40, -1]),
        "bfloat": torch.tensor([1.0, 0.25]).bfloat16(),
        "parameter": torch.nn.Parameter(torch.tensor([4.0])),
    }
    save_tensors(tmp_path / "a.safetensors", tensors, {"k": "é"})
    loaded = load_file(tmp_path / "a.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(loaded[name], tensor.detach(), rtol=0, atol=0)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"k": "é"}


def test_equal_tensors_give_equal_bytes_whatever_the_order_of_metadata(tmp_path: Path) -> None:
    metadata = {f"key{i}": str(i) for i in range(8)}
    tensors = {"b": torch.ones(3), "a": torch.zeros(2)}
    save_tensors(tmp_path / "1.safetensors", tensors, metadata)
    save_tensors(tmp_path / "2.safetensors", tensors, dict(reversed(metadata.items())))
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_a_type_the_format_lacks_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'x' of torch\.complex128 cannot be stored"):
        save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(1, dtype=torch.complex128)})
    assert names_in(tmp_path) == []


def test_counts_of_a_resume_point_are_whole_numbers() -> None:
    known: dict[str, Any] = {"step": 3, "pool": -1, "most": 2**63 - 1, "name": "x"}
    assert counts_of(known, "step", "most") == {"step": 3, "most": 2**63 - 1}
    assert counts_of(known, "pool", least=-1) == {"pool": -1}
    for odd in (-1, 2**63, 1.0, True, "3", None, [3]):
        with pytest.raises(ValueError, match="step is .*, expected a whole number"):
            counts_of({**known, "step": odd}, "most", "step")
    with pytest.raises(KeyError):
        counts_of(known, "images")


def test_what_cannot_be_written_is_named_where_nothing_can_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path, *_: object, **_options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    for name in ("write_bytes", "unlink"):  # as on a file system that is for reading alone
        monkeypatch.setattr(type(tmp_path), name, refused)
    with pytest.raises(OSError, match="cannot be written: Read-only file system") as told:
        write_text(tmp_path / "a.txt", "text")
    assert told.value.filename == str(tmp_path / "a.txt")
