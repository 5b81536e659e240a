"""Fields of documents with their refusals, what files are by their first bytes, and hashes."""

from __future__ import annotations

import datetime
import errno
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from merge_rl.errors import CheckpointError, HashMismatchError, ManifestError, RunError
from merge_rl.storage.files import documents
from merge_rl.storage.files.documents import (
    Fields,
    kind_by_content,
    nearest,
    reading_from,
    require_hash,
    require_plain,
    sha256_file,
)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("whitned", "; did you mean 'whitened'?"),
        ("affin", "; did you mean 'affine'?"),
        ("afxyz", ""),  # two letters of five and six alike: 4 / 11
        ("frxx", ""),  # 2 * 2 / 8 of "free": half
        ("freexxxxx", "; did you mean 'free'?"),  # 2 * 4 / 13: just enough
        ("", ""),
    ],
)
def test_the_nearest_name(name: str, hint: str) -> None:
    assert nearest(name, ["affine", "whitened", "free"]) == hint


@pytest.mark.parametrize(
    ("first", "kind"),
    [
        (b"\x05\0\0\0\0\0\0\0{abc", "a safetensors file"),
        (b"\x05\0\0\0\1\0\0\0{abc", None),  # a header of 4 GiB
        (b"\x05\0\0\0\0\0\0\1{abc", None),
        (b"\x05\0\0\0\0\0\0\0[abc", None),
        (b"PK\x03\x04", "an archive as torch.save writes (.pt)"),
        (b"PK\x03", None),
        (b"\x80\x04", "a pickle"),
        (b"<html>", "a page of the web, which a download may leave in the place of a file"),
        (b'{"a": 1}', "a JSON document"),
        (b"x" * 16, "text"),
        (b"PK\x05\x06", "an empty archive"),
        (b"hello", "text"),
        (b"a b", None),
        (b"a: [1\n", "text"),
        (b"one word and more\nline", "text"),
        (b"(dp0\nS'a'\n", None),  # as pickles without bytes begin
        (b"ccopy_reg\n_reconstructor\n", None),
        (b"a b\tc", None),
        (b"x" * 32 + b"\xff\n", "text"),  # as far as it is looked at
        (b"x" * 31 + b"\xff", None),
        (b"x" * 31 + b"\n", "text"),
        (b"", None),
    ],
)
def test_kinds_by_content(first: bytes, kind: str | None) -> None:
    assert kind_by_content(first) == kind


def test_plain_data_is_let_through() -> None:
    require_plain({"a": [1, 0.5, True, None, "text", {"b": []}]}, "m")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": [0, datetime.date(2024, 1, 2)]}}, "m, a, b[1]: expected text, a number, true, "
         "false, a list or a mapping, found datetime.date(2024, 1, 2)"),
        ({"a": {1: 2}}, "m, a: expected text as key, found 1"),
        (b"bytes", "m: expected text, a number, true, false, a list or a mapping, found b'bytes'"),
    ],
)  # fmt: skip
def test_what_json_cannot_hold_is_refused(value: object, message: str) -> None:
    with pytest.raises(ManifestError) as told:
        require_plain(value, "m")
    assert str(told.value) == message


DOCUMENT: dict[str, Any] = {
    "text": "words", "blank": " ", "flag": False, "count": 0, "number": -0.5, "list": [1],
    "mapping": {"a": 1}, "left": None,
}  # fmt: skip


def fields(**more: object) -> Fields:
    return Fields({**DOCUMENT, **more}, "here", required=["text"], optional=[*DOCUMENT, "bad"])


def test_fields_by_type() -> None:
    found = fields()
    assert (found.text("text"), found.needed_text("text"), found.text("left")) == ("words",) * 2 + (
        None,
    )
    assert found.flag("flag") is False
    assert (found.count("count"), found.number("number")) == (0, -0.5)
    assert (found.entries("list"), found.mapping("mapping")) == ([1], {"a": 1})
    empty = found.flag("left"), found.count("left"), found.number("left")
    assert empty == (None, None, None)
    assert (found.entries("left"), found.mapping("left")) == ([], {})
    assert ("text" in found, "left" in found, "bad" in found) == (True, False, False)
    assert (found.raw("count"), found.raw("bad"), found.where) == (0, None, "here")


@pytest.mark.parametrize(
    ("method", "value", "expected", "shown"),
    [
        ("text", 3, "text", "3"), ("text", " ", "text", "the text ' '"), ("text", [1], "text",
         "a list of 1"), ("needed_text", None, "text", "nothing"),
        ("flag", 0, "true or false", "0"), ("flag", "true", "true or false", "the text 'true'"),
        ("count", -1, "a whole number of at least 0, within 64 bits", "-1"),
        ("count", 10**20, "a whole number of at least 0, within 64 bits", "100000000000000000000"),
        ("count", 0.5, "a whole number of at least 0, within 64 bits", "0.5"),
        ("count", True, "a whole number of at least 0, within 64 bits", "True"),
        ("number", [], "a number", "a list of 0"), ("number", True, "a number", "True"),
        ("entries", {}, "a list", "a mapping"), ("mapping", [], "a mapping", "a list of 0"),
    ],
)  # fmt: skip
def test_fields_of_another_type(method: str, value: object, expected: str, shown: str) -> None:
    read: Callable[[str], object] = getattr(fields(bad=value), method)
    with pytest.raises(ManifestError) as told:
        read("bad")
    assert str(told.value) == f"here, bad: expected {expected}, found {shown}"


def test_a_mapping_holds_plain_data() -> None:
    with pytest.raises(ManifestError, match="^here, bad: expected text as key, found 1$"):
        fields(bad={1: 2}).mapping("bad")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "here: expected a mapping, found a list of 1"),
        ({"need": 1, "no": 2}, "here: unknown key 'no' (known: need, other)"),
        ({"need": 1, "othr": 2}, "here: unknown key 'othr'; did you mean 'other'? (known: need, "
         "other)"),
        ({"other": 1}, "here: the key 'need' is missing"),
        ({"need": None}, "here: the key 'need' is missing"),
    ],
)  # fmt: skip
def test_keys_are_those_that_are_known(value: object, message: str) -> None:
    with pytest.raises(ManifestError) as told:
        Fields(value, "here", required=["need"], optional=["other"])
    assert str(told.value) == message


def test_a_file_is_hashed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    monkeypatch.setattr(documents, "CHUNK_BYTES", 2)
    told: list[tuple[int, int]] = []
    expected = hashlib.sha256(b"12345").hexdigest()
    assert sha256_file(path, lambda done, total: told.append((done, total))) == expected
    assert told == [(2, 5), (4, 5), (5, 5)]
    assert sha256_file(path) == expected
    with pytest.raises(CheckpointError, match="b: no such file$"):
        sha256_file(tmp_path / "b")


def test_a_file_that_fails_while_it_is_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(io.BytesIO):
        def read(self, _size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))  # without a name, as systems do

    monkeypatch.setattr(documents, "open_file", lambda *_: Broken())
    problem = f"^lines: cannot be read: {os.strerror(errno.EIO)}$"
    with pytest.raises(RunError, match=problem), reading_from(Path("lines"), RunError) as file:
        file.read()


def test_hashes_are_held_against_what_is_recorded() -> None:
    require_hash(Path("a"), "12", "12")
    require_hash(Path("a"), "12", None)
    with pytest.raises(HashMismatchError, match="^a: SHA-256 is 12, but the manifest records 13: "):
        require_hash(Path("a"), "12", "13")
