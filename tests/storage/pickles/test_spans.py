"""Bytes of untrusted files in pieces: exactly those that were asked for, or a refusal."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import pytest

from merge_rl.errors import CheckpointError
from merge_rl.storage.pickles import spans
from merge_rl.storage.pickles.reading import TorchArchive, _AsFile, read_data
from merge_rl.storage.pickles.spans import ByteSource, Cursor, PartSource, Span
from merge_rl.storage.pickles.values import Budget


@pytest.fixture(params=["file", "buffer", "part"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> ByteSource:
    """Eight bytes, a to h."""
    if request.param == "file":
        (tmp_path / "a").write_bytes(b"abcdefgh")
        return ByteSource(tmp_path / "a", "a")
    if request.param == "buffer":
        return ByteSource(b"abcdefgh", "a")
    return PartSource(Span(ByteSource(b"--abcdefgh--", "a"), 2, 8))


def cursor_over(source: ByteSource) -> Cursor:
    return Cursor(Span(source, 0, source.size))


def test_sources_have_names(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    found = [ByteSource(content, name).name for content in (b"a", tmp_path / "a")
             for name in (None, "x")]  # fmt: skip
    assert found == ["buffer", "x", str(tmp_path / "a"), "x"]


def test_reads_are_exact(source: ByteSource) -> None:
    assert [source.read(0, 8), source.read(2, 3), source.read(8, 0)] == [b"abcdefgh", b"cde", b""]
    for offset, length in ((0, 9), (8, 1), (-1, 1), (0, -1), (9, -1)):
        with pytest.raises(CheckpointError, match="a: the file is truncated"):
            source.read(offset, length)


def test_spans_are_parts_of_their_source(source: ByteSource) -> None:
    span = Span(source, 2, 5)
    assert (len(span), bytes(span), span.read()) == (5, b"cdefg", b"cdefg")
    assert bytes(span) is bytes(span)  # in memory once
    assert repr(span) == "<5 bytes of a>"
    assert list(span.pieces(2)) == [b"cd", b"ef", b"g"]
    assert [span.part(1, 3).read(), span.part(5, 0).read()] == [b"def", b""]
    assert span.part(0, 5).part(1, 2).read() == b"de"
    for begin, length in ((0, 6), (5, 1), (-1, 1), (1, -1)):
        with pytest.raises(
            CheckpointError, match=f"{length} bytes from byte {2 + begin} on were exp"
        ):
            span.part(begin, length)
    for begin, length in ((0, 9), (8, 1), (-1, 1), (1, -1)):
        with pytest.raises(
            CheckpointError, match=f"{length} bytes from byte {begin} on were expect"
        ):
            Span(source, begin, length)


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abcd")
    source = ByteSource(path, "a")
    with pytest.raises(CheckpointError, match="needs 5 bytes, found 4"):
        source.read(3, 2)
    with pytest.raises(CheckpointError, match="2 bytes from byte 4 on were expected, 0 are there"):
        Span(source, 0, 4).part(4, 2)
    path.unlink()
    with pytest.raises(CheckpointError, match="a: cannot be read: No such file or directory"):
        source.read(0, 1)


class Short:
    """A file that gives less than what it is asked for."""

    def __init__(self, *parts: bytes) -> None:
        self.parts, self.asked = list(parts), list[int]()

    def read(self, count: int) -> bytes:
        self.asked.append(count)
        return self.parts.pop(0)


def test_short_reads_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"abcde")
    source, file = ByteSource(tmp_path / "a"), Short(b"ab", b"c", b"de")
    monkeypatch.setattr(os, "read", lambda _descriptor, count: file.read(count))
    assert source.read(0, 5) == b"abcde"
    assert file.asked == [5, 3, 2]
    ended = Short(b"ab", b"")
    monkeypatch.setattr(os, "read", lambda _descriptor, count: ended.read(count))
    with pytest.raises(CheckpointError, match="a: the file became shorter while it was read"):
        source.read(1, 3)


def test_a_cursor_reads_across_the_edges_of_its_window(
    source: ByteSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spans, "WINDOW_BYTES", 3)
    cursor = cursor_over(source)
    assert (cursor.byte(), cursor.position, cursor.remaining) == (ord("a"), 1, 7)
    assert cursor.take(2) == b"bc"  # up to the edge
    assert cursor.take(1) == b"d"
    assert cursor.take(3) == b"efg"  # beyond it
    assert (cursor.position, cursor.byte(), cursor.remaining) == (7, ord("h"), 0)
    for read in (cursor.byte, lambda: cursor.take(1), lambda: cursor.skip(1)):
        with pytest.raises(CheckpointError, match="1 bytes were expected from byte 8 on, 0 are th"):
            read()
    for skipped in range(9):  # within the window and beyond
        cursor = cursor_over(source)
        assert cursor.byte() == ord("a")
        if skipped < 8:
            assert cursor.skip(skipped).read() == b"bcdefgh"[:skipped]
            assert cursor.position == 1 + skipped
        if skipped < 7:
            assert cursor.take(1) == b"bcdefgh"[skipped : skipped + 1]


def test_lines_end_within_their_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "WINDOW_BYTES", 4)
    monkeypatch.setattr(spans, "MAX_LINE_BYTES", 6)
    cursor = cursor_over(ByteSource(b"\nab\n\n01234\nx", "a"))
    assert [cursor.line() for _ in range(4)] == [b"", b"ab", b"", b"01234"]
    assert (cursor.position, cursor.byte()) == (11, ord("x"))
    for data in (b"012345\n", b"01"):
        cursor = cursor_over(ByteSource(b"_" + data, "a"))
        cursor.byte()
        with pytest.raises(
            CheckpointError, match="a line of text at byte 1, found none that ends w"
        ):
            cursor.line()


def test_a_part_is_read_like_a_file() -> None:
    assert read_data(Span(ByteSource(b"--K\x07.--"), 2, 3)) == 7


# ------------------------------------------------------------------------------------ archives


def test_a_source_as_a_file(source: ByteSource) -> None:
    file = _AsFile(source)
    assert file.seekable()
    assert [file.read(3), file.read(0), file.read(None), file.read()] == [
        b"abc",
        b"",
        b"defgh",
        b"",
    ]
    assert file.seek(-3, os.SEEK_END) == file.tell() == 5
    assert file.seek(1, os.SEEK_CUR) == 6
    assert file.read(9) == b"gh"
    assert file.seek(0) == 0
    assert file.read(-1) == b"abcdefgh"
    assert file.seek(20) == 20
    assert file.read(1) == b""
    with pytest.raises(OSError, match="a place before the start"):
        file.seek(-1)


def zipped(**entries: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return out.getvalue()


def test_an_archive_costs_what_its_names_take() -> None:
    budget = Budget("a", 1)
    before = budget.left
    archive = TorchArchive(ByteSource(zipped(ab=b"12", c=b""), "a"), budget)
    assert before - budget.left == 2 * 1000 + 2 * 3  # two entries, three letters
    assert archive.names == ("ab", "c")
    assert archive.span("ab").read() == b"12"
    with pytest.raises(CheckpointError, match="a: the archive lacks 'd'"):
        archive.span("d")


def test_entries_of_two_sizes_are_refused() -> None:
    data = zipped(a=b"1234")
    at = data.index(b"PK\x01\x02") + 24  # its size once unpacked
    changed = data[:at] + b"\x03" + data[at + 1 :]
    with pytest.raises(CheckpointError, match="'a' is not where the table of contents says"):
        TorchArchive(ByteSource(changed, "a"), Budget("a", 1)).span("a")


@pytest.mark.parametrize(
    ("names", "found"), [(["data.pkl", "a/x"], 0), (["a/data.pkl", "b/data.pkl"], 2)]
)
def test_an_archive_has_one_pickle_in_a_folder(names: list[str], found: int) -> None:
    entries = dict.fromkeys(names, b"N.")
    with pytest.raises(CheckpointError, match=f"one 'data.pkl' in a folder, found {found}"):
        read_data(zipped(**entries))
    if not found:
        assert read_data(zipped(**entries, **{"a/data.pkl": b"K\x07."})) == 7
