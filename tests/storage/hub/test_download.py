"""Downloads over real HTTP: resumed where they were cut, and refused where they are not sound."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from merge_rl.errors import DownloadError, HashMismatchError
from merge_rl.storage.hub.download import ATTEMPTS, fetch_url, probe_file
from merge_rl.storage.hub.web import is_loopback, require_safe, shown
from tests.children import largest_file
from tests.hub_server import Cut, FileServer

DATA = bytes(range(256)) * 4000  # about 1 MB, no two halves alike in place
SHA = hashlib.sha256(DATA).hexdigest()
OTHER = DATA[::-1]


class Waits(list[float]):
    """Keeps what would have been waited."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def ranges(web: FileServer) -> list[str | None]:
    return [request.headers.get("Range") for request in web.asked("GET")]


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_arrives_whole_with_its_hash(web: FileServer, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    url = web.put("/a.pkl", DATA)
    found = fetch_url(
        url, tmp_path / "deep" / "a.pkl", size=len(DATA), sha256=SHA.upper(),
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert (found.size, found.sha256, found.resumed) == (len(DATA), SHA, 0)
    assert found.path.read_bytes() == DATA
    assert left_in(found.path.parent) == ["a.pkl"]
    assert seen[-1] == (len(DATA), len(DATA))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert ranges(web) == [None]
    # The hash is right already: nothing is asked.
    fetch_url(url, found.path, sha256=SHA)
    assert len(web.requests) == 1


def test_a_connection_cut_in_mid_file_is_resumed_at_the_byte(
    web: FileServer, tmp_path: Path
) -> None:
    url, waits = web.put("/a.pkl", DATA), Waits()
    web.fail("GET", "a.pkl", Cut(300_000), Cut(200_000))
    found = fetch_url(url, tmp_path / "a.pkl", size=len(DATA), sha256=SHA, wait=waits)
    assert found.path.read_bytes() == DATA
    assert ranges(web) == [None, "bytes=300000-", "bytes=500000-"]
    assert [r.headers.get("If-Range") for r in web.asked("GET")] == [None, '"one"', '"one"']
    assert waits == [1.0, 1.0]  # both attempts brought news


def test_what_came_outlives_the_program(web: FileServer, tmp_path: Path) -> None:
    url, waits = web.put("/a.pkl", DATA), Waits()
    web.fail("GET", "a.pkl", Cut(400_000), *[503] * (ATTEMPTS - 1))
    with pytest.raises(DownloadError, match=r"answered 503 .*tried 6 times"):
        fetch_url(url, tmp_path / "a.pkl", wait=waits)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert left_in(tmp_path) == ["a.pkl.part", "a.pkl.part.json"]
    assert (tmp_path / "a.pkl.part").stat().st_size == 400_000

    found = fetch_url(url, tmp_path / "a.pkl", sha256=SHA)
    assert (found.resumed, ranges(web)[-1]) == (400_000, "bytes=400000-")
    assert left_in(tmp_path) == ["a.pkl"]


def test_a_changed_file_is_begun_anew(web: FileServer, tmp_path: Path) -> None:
    # With If-Range the server itself sends the whole new file.
    url = web.put("/a.pkl", DATA)
    web.fail("GET", "a.pkl", Cut(300_000), *[503] * ATTEMPTS)
    with pytest.raises(DownloadError):
        fetch_url(url, tmp_path / "a.pkl", wait=Waits())
    web.faults.clear()
    web.put("/a.pkl", OTHER, etag='"two"')
    assert fetch_url(url, tmp_path / "a.pkl").path.read_bytes() == OTHER


def test_parts_of_two_files_are_never_glued(web: FileServer, tmp_path: Path) -> None:
    # This server ignores If-Range and sends the end of another file.
    url = web.put("/a.pkl", DATA)
    web.fail("GET", "a.pkl", Cut(300_000), *[503] * ATTEMPTS)
    with pytest.raises(DownloadError):
        fetch_url(url, tmp_path / "a.pkl", wait=Waits())
    web.faults.clear()
    web.put("/a.pkl", OTHER, etag='"two"', heeds_if_range=False)
    assert fetch_url(url, tmp_path / "a.pkl", wait=Waits()).path.read_bytes() == OTHER
    assert ranges(web)[-2:] == ["bytes=300000-", None]


@pytest.mark.parametrize(
    "options",
    [{"ranges": False}, {"etag": None}, {"etag": 'W/"weak"'}],
    ids=["no ranges", "nothing to compare", "weak"],
)
def test_without_means_to_resume_the_file_comes_again(
    web: FileServer, tmp_path: Path, options: dict[str, object]
) -> None:
    url = web.put("/a.pkl", DATA, **options)
    web.fail("GET", "a.pkl", Cut(300_000))
    found = fetch_url(url, tmp_path / "a.pkl", wait=Waits())
    assert found.path.read_bytes() == DATA


def test_a_date_serves_where_the_etag_is_weak(web: FileServer, tmp_path: Path) -> None:
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    url = web.put("/a.pkl", DATA, etag='W/"weak"', modified=date)
    web.fail("GET", "a.pkl", Cut(300_000))
    assert fetch_url(url, tmp_path / "a.pkl", wait=Waits()).path.read_bytes() == DATA
    assert web.asked("GET")[-1].headers["If-Range"] == date


def test_a_damaged_note_is_no_reason_to_fail(web: FileServer, tmp_path: Path) -> None:
    url = web.put("/a.pkl", DATA)
    for note in ("", "[]", '{"url": 3}', json.dumps({"url": shown(url), "size": "x"})):
        (tmp_path / "a.pkl.part").write_bytes(b"rubbish")
        (tmp_path / "a.pkl.part.json").write_text(note)
        assert fetch_url(url, tmp_path / "a.pkl").path.read_bytes() == DATA


def test_a_wrong_hash_leaves_nothing(web: FileServer, tmp_path: Path) -> None:
    url = web.put("/a.pkl", OTHER)
    with pytest.raises(HashMismatchError, match=rf"has the SHA-256 [0-9a-f]{{64}}, expected {SHA}"):
        fetch_url(url, tmp_path / "a.pkl", sha256=SHA)
    assert left_in(tmp_path) == []


def test_a_wrong_length_is_refused_before_the_body(web: FileServer, tmp_path: Path) -> None:
    url = web.put("/a.pkl", DATA)
    with pytest.raises(DownloadError, match="announces 1024000 bytes, expected 999"):
        fetch_url(url, tmp_path / "a.pkl", size=999)
    assert left_in(tmp_path) == []


def test_a_body_beyond_its_length_is_not_read(web: FileServer, tmp_path: Path) -> None:
    url = web.put("/a.pkl", DATA, announced=len(DATA), extra=b"x" * 100_000)
    assert fetch_url(url, tmp_path / "a.pkl", sha256=SHA).size == len(DATA)
    # In pieces without an end, the length is known from the range alone.
    web.put("/b.pkl", DATA)
    web.fail("GET", "b.pkl", Cut(1000))
    web.pages["/b.pkl"].chunked = False
    url = web.url + "/b.pkl"
    web.pages["/b.pkl"].extra = b""

    def grow(_seconds: float) -> None:
        web.pages["/b.pkl"].chunked, web.pages["/b.pkl"].extra = True, b"x" * 100_000

    with pytest.raises(DownloadError, match="sends more than its 1024000 bytes"):
        fetch_url(url, tmp_path / "b.pkl", wait=grow)
    assert left_in(tmp_path) == ["a.pkl"]


def test_a_file_without_a_length_is_refused(web: FileServer, tmp_path: Path) -> None:
    url = web.put("/a.pkl", DATA, chunked=True)
    with pytest.raises(DownloadError, match="does not say how large the file is"):
        fetch_url(url, tmp_path / "a.pkl")


def test_a_short_body_is_a_cut_connection(web: FileServer, tmp_path: Path) -> None:
    url = web.put("/a.pkl", DATA, announced=len(DATA) + 7, ranges=False)
    with pytest.raises(DownloadError, match="broke after 1,024,000 of 1,024,007 bytes: closed by"):
        fetch_url(url, tmp_path / "a.pkl", wait=Waits())
    assert len(web.requests) == ATTEMPTS


def test_a_full_disk_names_the_file_and_what_came_is_kept(web: FileServer, tmp_path: Path) -> None:
    url = web.put("/a.pkl", DATA)
    with largest_file(400_000), pytest.raises(OSError, match="cannot be written") as caught:
        fetch_url(url, tmp_path / "a.pkl")
    assert caught.value.filename == str(tmp_path / "a.pkl")
    found = fetch_url(url, tmp_path / "a.pkl")
    assert (found.sha256, found.resumed) == (SHA, 400_000)


def test_a_compressed_body_is_refused(web: FileServer, tmp_path: Path) -> None:
    url = web.put("/a.pkl", DATA, headers={"Content-Encoding": "gzip"})
    with pytest.raises(DownloadError, match="expected the file as it is, found it gzip-encoded"):
        fetch_url(url, tmp_path / "a.pkl")
    assert web.requests[0].headers["Accept-Encoding"] == "identity"


def test_busy_servers_are_tried_again_and_others_are_not(web: FileServer, tmp_path: Path) -> None:
    url, waits = web.put("/a.pkl", DATA), Waits()
    web.fail("GET", "a.pkl", 503, 429, 500)
    assert fetch_url(url, tmp_path / "a.pkl", wait=waits).sha256 == SHA
    assert waits == [1.0, 2.0, 4.0]
    for status in (401, 403, 404, 410):
        web.requests.clear()
        web.fail("GET", "b.pkl", status)
        with pytest.raises(DownloadError, match=rf"b\.pkl: the server answered {status} \("):
            fetch_url(web.url + "/b.pkl", tmp_path / "b.pkl")
        assert len(web.requests) == 1


def test_no_server_is_one_sentence(tmp_path: Path, web: FileServer) -> None:
    url = web.put("/a.pkl?rlkey=secret", DATA)
    web.stop()
    with pytest.raises(DownloadError, match=r"a\.pkl: no connection: .*refused") as caught:
        fetch_url(url, tmp_path / "a.pkl", wait=Waits())
    assert "secret" not in str(caught.value)


def test_a_probe_asks_for_one_byte(web: FileServer) -> None:
    body = probe_file(web.put("/a.pkl", DATA))
    assert (body.size, body.etag, ranges(web)) == (len(DATA), '"one"', ["bytes=0-0"])
    assert probe_file(web.put("/b.pkl", DATA, ranges=False)).size == len(DATA)
    web.fail("GET", "a.pkl", 503)
    assert probe_file(web.url + "/a.pkl", wait=Waits()).size == len(DATA)


def test_redirects_are_followed_within_reason(web: FileServer, tmp_path: Path) -> None:
    web.put("/real.pkl", DATA)
    url = web.put("/a.pkl", b"", location="/real.pkl")
    assert fetch_url(url, tmp_path / "a.pkl").sha256 == SHA
    url = web.put("/loop.pkl", b"", location="/loop.pkl")
    with pytest.raises(DownloadError, match="redirected more than 5 times"):
        fetch_url(url, tmp_path / "loop.pkl")


@pytest.mark.parametrize(
    "target",
    ["file:///etc/passwd", "ftp://127.0.0.1/a", "http://example.org/a", "data:,x", "http://[/a"],
)
def test_redirects_to_other_schemes_are_refused(
    web: FileServer, tmp_path: Path, target: str
) -> None:
    url = web.put("/a.pkl", b"", location=target)
    with pytest.raises(DownloadError, match="expected an https address|not an address"):
        fetch_url(url, tmp_path / "a.pkl")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://example.org/a", "expected an https address, found 'http'"),
        ("file:///etc/passwd", "expected an https address, found 'file'"),
        ("https://user:secret@example.org/a", "found a user name"),
        ("https:///a", "expected a plain host name"),
        ("https://example.org:port/a", "not an address"),
        ("a.pkl", "expected an https address"),
    ],
)
def test_unsafe_addresses_are_refused(url: str, problem: str) -> None:
    with pytest.raises(DownloadError, match=problem) as caught:
        require_safe(url)
    assert "secret" not in str(caught.value)


def test_only_this_machine_may_be_asked_over_plain_http() -> None:
    for host in ("localhost", "127.0.0.1", "127.9.9.9", "::1"):
        assert is_loopback(host)
    for other in ("example.org", "127.0.0.1.example.org", "10.0.0.1", "localhost.org", "", None):
        assert not is_loopback(other)
