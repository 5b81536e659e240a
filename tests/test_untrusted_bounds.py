"""Where the bounds of untrusted files lie, to the byte, and what is said beyond them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from merge_rl import untrusted
from merge_rl.errors import CheckpointError, ConfigError, ManifestError
from merge_rl.untrusted import describe, is_there, open_file, pointer_problem, read_bounded, reason

BLOCK = 4096  # of data, of which file systems store no part
POINTER = b"version https://git-lfs.github.com/spec/v1\n"


def holes(path: Path, size: int, *data: int) -> Path:
    """A file of this size, of which only the blocks at these places are stored."""
    with path.open("wb") as file:
        file.truncate(size)
        for place in data:
            file.seek(place)
            file.write(b"x" * BLOCK)
    with path.open("rb") as file:
        try:
            os.lseek(file.fileno(), 1 if not data else data[-1] + BLOCK, os.SEEK_DATA)
        except OSError:
            return path
    pytest.skip("this file system does not tell holes from data")


def test_files_of_holes_are_read_up_to_what_is_free_or_a_hundred_times_their_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(untrusted, "FREE_BYTES", BLOCK)
    path = tmp_path / "a"
    open_file(holes(path, BLOCK)).close()
    with pytest.raises(CheckpointError, match="a: 4097 bytes of which 0 are stored, the rest are"):
        open_file(holes(path, BLOCK + 1))
    # 100 times two blocks, with a hole between them and one behind.
    most, places = 100 * 2 * BLOCK, (0, 64 * BLOCK)
    with open_file(holes(path, most, *places)) as file:
        assert len(file.read()) == most
    with pytest.raises(CheckpointError, match=f"{most + 1} bytes of which 8192 are stored"):
        open_file(holes(path, most + 1, *places))
    monkeypatch.setattr(untrusted, "_MAX_PIECES", 1)  # no more are counted: all may be data
    open_file(path).close()


def test_a_system_that_cannot_tell_holes_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(untrusted, "FREE_BYTES", BLOCK)
    path, seek = holes(tmp_path / "a", 2 * BLOCK), os.lseek

    def unable(file: int, place: int, how: int) -> int:
        if how == os.SEEK_DATA:
            raise OSError(22, "Invalid argument")
        return seek(file, place, how)

    monkeypatch.setattr(os, "lseek", unable)
    open_file(path).close()
    monkeypatch.delattr(os, "SEEK_DATA")
    open_file(path).close()


def test_pointers_are_at_most_a_kibibyte(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(POINTER.ljust(1024))
    with pytest.raises(CheckpointError, match="a: a Git LFS pointer to a file, which was not"):
        open_file(path)
    path.write_bytes(POINTER.ljust(1025))
    with open_file(path) as file:
        assert file.read() == POINTER.ljust(1025)
    told = pointer_problem(POINTER + b"size 1234\n")
    assert told is not None
    assert told.startswith("a Git LFS pointer to a file of 1,234 bytes, which was not fetched; ")
    assert pointer_problem(b" " + POINTER) is None


def test_what_is_not_there_is_none_and_no_other_refusal(tmp_path: Path) -> None:
    assert not is_there(tmp_path / "a")
    with pytest.raises(ConfigError, match="a: no such file"):
        open_file(tmp_path / "a", ConfigError)
    (tmp_path / "a").write_bytes(b"abcd")
    assert is_there(tmp_path / "a")


def test_texts_are_read_up_to_their_limit(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abcd")
    assert read_bounded(path, 4) == "abcd"
    path.write_bytes(b"abcde")
    with pytest.raises(ManifestError, match="a: larger than 4 bytes, the most that is read"):
        read_bounded(path, 4)
    path.write_bytes(b"ab\xff")
    with pytest.raises(ManifestError, match=r"a: .* bytes that are not UTF-8 \(byte 2\)"):
        read_bounded(path, 4)


def test_the_key_that_is_there_twice_is_named_and_its_place() -> None:
    with pytest.raises(ConfigError, match="x: not readable JSON: the key 'b' appears twice"):
        untrusted.parse_json('{"a": 1, "b": 2, "b": 3}', "x", ConfigError)
    with pytest.raises(ConfigError, match=r"the key 'b' appears twice \(line 3, column 2\)$"):
        untrusted.parse_yaml(" a: 1\n b: 2\n b: 3\n", "x", ConfigError)
    with pytest.raises(ConfigError, match="aliases are not allowed$"):  # without a place
        untrusted.parse_yaml("[&a 1, *a]", "x", ConfigError)


def test_documents_that_are_no_deeper_than_usual_take_the_quick_way() -> None:
    assert untrusted._is_usual("a: [{b: 1}]")
    assert untrusted._is_usual("[" * 20 + "]" * 20 + "\n")
    assert not untrusted._is_usual("[" * 21 + "]" * 21)
    assert not untrusted._is_usual("[&a 1, *a]")
    assert untrusted._is_usual("[" + "[], " * 30 + "]")  # many, but side by side


def test_a_few_words_for_every_kind_of_value() -> None:
    values = [None, {"a": 1}, [1, 2], "a", 1.5, True]
    told = ["nothing", "a mapping", "a list of 2", "the text 'a'", "1.5", "True"]
    assert [describe(value) for value in values] == told
    assert reason(OSError(28, "No space\n left")) == "No space left"
    assert reason(ValueError("of its own")) == "of its own"
    assert reason(ValueError()) == "ValueError"
