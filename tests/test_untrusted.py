"""What comes from anywhere: kinds of files, holes, and documents that would grow."""

from __future__ import annotations

import errno
import io
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from merge_rl import untrusted
from merge_rl.config import OptimizeConfig, load_config
from merge_rl.errors import CheckpointError, ConfigError, ManifestError, MergeRLError, RunError
from merge_rl.storage.checkpoints import has_manifest, open_checkpoints
from merge_rl.storage.files import read_file, read_header, read_index, sha256_file
from merge_rl.storage.pickles import read_data
from merge_rl.storage.runs import RunDir, folder_kind
from merge_rl.untrusted import (
    MAX_DEPTH,
    describe,
    load_json_mapping,
    load_yaml,
    open_file,
    parse_json,
    parse_yaml,
    read_bounded,
    reason,
)
from merge_rl.workflows.reference import load_features, load_reference


def make(kind: str, folder: Path) -> Path:
    """Something in a folder's place that is no file."""
    path = folder / "it"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        os.chdir(folder)  # paths of sockets are short
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("it")
    return path


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux")
def test_a_file_that_the_system_cannot_read_is_named() -> None:
    # A regular file of 0 bytes, by its status, whose first page nobody has.
    for read in (open_file, sha256_file, read_bounded, read_data, read_header):
        with pytest.raises(MergeRLError, match="^/proc/self/mem: cannot be read: Input/output err"):
            read(Path("/proc/self/mem"))


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a device", "a socket"])
def test_only_files_are_opened(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # and back
    path = make(kind, tmp_path)
    readers: list[Callable[[Path], object]] = [
        open_file, sha256_file, read_bounded, load_yaml, read_data, load_features, read_header,
    ]  # fmt: skip
    if kind != "a folder":
        readers.append(load_reference)  # of a folder it expects a model
    for suffix in (".safetensors", ".npz", ".pkl"):
        named = path = path.rename(path.with_suffix(suffix))
        for read in readers:
            with pytest.raises(MergeRLError, match=f"expected a file, found {kind}"):
                read(named)
        with pytest.raises(CheckpointError, match=f"expected a file, found {kind}"):
            read_file(named, hashed=False)
        with pytest.raises(ConfigError, match=f"expected a file, found {kind}"):
            load_config(OptimizeConfig, named)


@pytest.mark.parametrize("name", ["checkpoints_manifest.yaml", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a device"])
def test_what_stands_for_a_document_is_not_passed_over(
    kind: str, name: str, tmp_path: Path
) -> None:
    make(kind, tmp_path).rename(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: expected a file, found {kind}"):
        open_checkpoints(tmp_path) if "manifest" in name else read_index(tmp_path)
    if "manifest" in name:
        with pytest.raises(ManifestError, match=f"expected a file, found {kind}"):
            has_manifest(tmp_path)


@pytest.mark.parametrize("name", ["config.yaml", "finetune.yaml", "settings.json"])
@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a device"])
def test_what_stands_for_a_run_is_not_passed_over(kind: str, name: str, tmp_path: Path) -> None:
    make(kind, tmp_path).rename(tmp_path / name)
    (tmp_path / "inputs.json").write_text("{}")
    with pytest.raises(MergeRLError, match=f"{name}: expected a file, found {kind}"):
        folder_kind(tmp_path)
    if name != "finetune.yaml":
        with pytest.raises(RunError, match=f"{name}: expected a file, found {kind}"):
            RunDir.open(tmp_path)


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a device"])
def test_what_stands_for_a_resume_point_does_not_begin_anew(kind: str, tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", OptimizeConfig(checkpoints="x"), {})
    make(kind, tmp_path).rename(run.state_path)
    with pytest.raises(RunError, match=f"resume point: expected a file, found {kind}"):
        run.load_state()


def test_files_of_holes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.truncate(200 * 2**30)
    try:
        with path.open("rb") as file:
            os.lseek(file.fileno(), 0, os.SEEK_DATA)
        pytest.skip("this file system does not tell holes from data")
    except OSError:
        pass
    with pytest.raises(CheckpointError, match="214748364800 bytes of which 0 are stored, the rest"):
        open_file(path)
    with path.open("r+b") as file:
        file.truncate(2**20)
    with open_file(path) as found:  # what fits into memory may be empty
        assert found.read() == bytes(2**20)


def test_names_that_no_file_can_have() -> None:
    with pytest.raises(CheckpointError, match="cannot be read: embedded null byte"):
        open_file("a\0b")
    with pytest.raises(ConfigError, match="cannot be read: File name too long"):
        open_file("a" * 5000, ConfigError)


# ----------------------------------------------------------------------------------- documents


def test_aliases_do_not_blow_up(tmp_path: Path) -> None:
    rows = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    path = tmp_path / "config.yaml"
    path.write_text("\n".join(rows))
    with pytest.raises(ConfigError, match="not readable YAML: aliases are not allowed"):
        load_config(OptimizeConfig, path)
    with pytest.raises(ConfigError, match="aliases are not allowed"):
        parse_yaml("[&a 1, *a]", "--set x", ConfigError)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("!!int ''", "a value that does not fit its tag"),
        ("!!bool x", "a value that does not fit its tag"),
        ("2024-99-99", "month must be in 1..12"),
        ("{a: 1, a: 2}", "the key 'a' appears twice"),
        ("[" * 500, "nested too deeply"),  # what is no key yet is looked for in each bracket
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested too deeply"),
        ("!!python/name:os.system", "could not determine a constructor"),
        ("a\0b", ".*special characters are not allowed"),
        (r'"\ud800"', r"'\\ud800' is half of a character"),
        (r'{"\U0000DFFF": 1}', r"'\\udfff' is half of a character"),
    ],
)
def test_yaml_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"here: not readable YAML: {why}"):
        parse_yaml(text, "here", ConfigError)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' appears twice"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested too deeply"),
        (b'{"a": "\xff"}', "'utf-8' codec"),
        ("1" * 5000, "Exceeds the limit"),
        ("{", "Expecting property name"),
        (r'["a\ud800"]', r"'\\ud800' is half of a character"),
        (b'{"\xed\xa0\x80": 1}', "'utf-8' codec"),
    ],
)
def test_json_refused(text: str | bytes, why: str) -> None:
    with pytest.raises(ManifestError, match=f"here: not readable JSON: {why}"):
        parse_json(text, "here", ManifestError)


def test_what_is_within_bounds_is_read() -> None:
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert str(parse_json(deep, "x")) == str(parse_yaml(deep, "x")) == deep
    assert load_json_mapping('{"a": {"a": [1, null]}}', "x") == {"a": {"a": [1, None]}}
    assert parse_json(r'"\ud83d\ude00"', "x") == "\U0001f600"  # both halves
    assert parse_json(b'\xef\xbb\xbf{"a": 1}', "x") == {"a": 1}  # as Windows editors save it
    with pytest.raises(CheckpointError, match="x: expected a JSON object, found a list of 1"):
        load_json_mapping("[1]", "x")


def test_what_is_quoted_is_cut_beyond_its_most() -> None:
    assert reason(ValueError("x" * 300)) == "x" * 300
    assert reason(ValueError("x" * 301)) == "x" * 300 + "..."
    whole, longer = "x" * 58, "x" * 59  # of which quotes make 60 and 61 characters
    assert describe(whole) == f"the text '{whole}'"
    assert describe(longer) == f"the text '{longer[:56]}..."


def test_a_disk_that_fails_while_reading_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(io.BytesIO):
        def read(self, _size: int | None = -1, /) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(untrusted, "open_file", lambda _path, _refusal: Failing())
    with pytest.raises(ConfigError, match="a: cannot be read: Input/output error"):
        read_bounded(tmp_path / "a", refusal=ConfigError)
