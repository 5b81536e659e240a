"""Zip files by hand: where each entry lies, which archives are refused, what is closed when."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import pytest

from merge_rl.errors import DataFileError
from merge_rl.storage.files.archives import Archive, reading

HEADER = 30  # bytes of an entry's own header, before its name
ROW = 46  # bytes of its row in the table of contents, before its name
CONTENT = {"a": b"12345", "long": b"", "b": b"7" * 20}  # stored as they are
ENDS = {"a": 36, "long": 70, "b": 121}  # HEADER + name + content, one after the other
TABLE = 3 * ROW + 6  # bytes of the table of contents


def zipped(method: int = zipfile.ZIP_STORED) -> bytearray:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in CONTENT.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return bytearray(file.getvalue())


def opened(data: bytes | bytearray, **options: int) -> tuple[Archive, io.BytesIO]:
    file = io.BytesIO(data)
    return Archive(lambda: file, "here", DataFileError, "zip", **options), file


def row(data: bytes | bytearray, number: int) -> int:
    """Where a row of the table of contents begins."""
    names = list(CONTENT)[:number]
    return ENDS["b"] + sum(ROW + len(name) for name in names)


def refused(data: bytes | bytearray, **options: int) -> str:
    """What is said of an archive that is refused; its file is closed by then."""
    file = io.BytesIO(data)
    with pytest.raises(DataFileError) as told:
        Archive(lambda: file, "here", DataFileError, "zip", **options)
    assert file.closed
    assert str(told.value).startswith("here: not a readable zip: ")
    return str(told.value).removeprefix("here: not a readable zip: ")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_entries_are_read_each_in_its_own_place(method: int) -> None:
    archive, file = opened(zipped(method))
    for member in archive.infolist():
        with archive.entry(member) as entry:
            assert entry.read() == CONTENT[member.filename]
            assert entry.seekable()
            assert entry.seek(0) == 0
            assert entry.read(3) == CONTENT[member.filename][:3]
    if method == zipfile.ZIP_STORED:
        assert archive.ends == ENDS
    archive.close()
    assert file.closed


def test_what_was_never_opened_can_be_closed() -> None:
    Archive.__new__(Archive).close()  # as Python does where the opener has raised


def test_places_that_no_two_readers_agree_on_are_refused() -> None:
    place = "the entry 'b' is not where the table of contents says"
    for at, value in (
        (20, len(CONTENT["b"]) + 1),  # its size: one byte into the table of contents
        (42, ENDS["long"] + 1),  # its offset
    ):
        data = zipped()
        struct.pack_into("<L", data, row(data, 2) + at, value)
        assert refused(data) == place
    inside = zipped()
    struct.pack_into("<L", inside, row(inside, 0) + 20, len(CONTENT["a"]) + 1)
    assert refused(inside) == "the entry 'a' is not where the table of contents says"
    before = zipped()
    struct.pack_into("<L", before, row(before, 0) + 42, 2**32 - 1)
    assert refused(before) == "the entry 'a' is not where the table of contents says"
    early = zipped()[1:]  # a byte is lost: all begin one before they say, the first at -1
    assert refused(early) == "the entry 'a' is not where the table of contents says"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (b"b", "the entry 'b' is there twice"),
        (b"\0", r"an entry has the impossible name '\x00'"),
    ],
)
def test_names_that_cannot_be_are_refused(name: bytes, problem: str) -> None:
    data = zipped()
    data[row(data, 0) + ROW : row(data, 0) + ROW + 1] = name
    assert refused(data) == problem


def test_an_entry_without_a_name_is_refused() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo(""), b"1")
    assert refused(file.getvalue()) == "an entry has the impossible name ''"


@pytest.mark.parametrize(
    ("at", "value", "problem"),
    [
        (8, 1, "encrypted, expected an archive without a password; unpack it first"),
        (10, zipfile.ZIP_BZIP2, "packed by method 12, expected stored or deflated"),
        (10, 99, "packed by method 99, expected stored or deflated"),
    ],
)
def test_entries_that_cannot_be_undone_in_pieces(at: int, value: int, problem: str) -> None:
    data = zipped()
    struct.pack_into("<H", data, row(data, 1) + at, value)
    archive, _ = opened(data)
    first, odd, _last = archive.infolist()
    with archive.entry(first) as entry:
        assert entry.read() == CONTENT["a"]
    with pytest.raises(DataFileError, match=f"^here: 'long' is {problem}$"):
        archive.entry(odd)
    archive.close()


def test_the_table_of_contents_is_bounded() -> None:
    archive, _ = opened(zipped(), max_directory=TABLE)
    assert archive.namelist() == list(CONTENT)
    archive.close()
    told = f"its table of contents takes {TABLE} bytes, at most {TABLE - 1} are read"
    assert refused(zipped(), max_directory=TABLE - 1) == told


def test_a_bound_is_one_of_the_table_alone() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", b"1" * 5000)
    bounded, _ = opened(file.getvalue(), max_directory=100)
    with bounded.entry(bounded.infolist()[0]) as entry:
        assert len(entry.read(5000)) == 5000
    bounded.close()


def test_another_kind_of_file_is_called_so() -> None:
    told = "no table of contents at its end: another kind of file, or truncated"
    assert refused(b"no zip at all") == told


def test_damage_is_one_sentence_and_other_errors_are_their_own(tmp_path: Path) -> None:
    with (
        pytest.raises(DataFileError, match="^x: not a readable y: two lines$"),
        reading("x", DataFileError, "y"),
    ):
        raise EOFError("two\n lines")
    with pytest.raises(KeyboardInterrupt), reading("x", DataFileError, "y"):
        raise KeyboardInterrupt
    with reading("x", DataFileError, "y"):
        pass
