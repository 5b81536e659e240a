"""Published weights: fetched once, checked at every use."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from merge_rl.errors import DownloadError, HashMismatchError, UnknownNameError
from merge_rl.workflows.assembly.networks import (
    PUBLIC_FILES,
    PublicFile,
    cache_folder,
    fetch_public,
)
from tests.hub_server import FileServer

DATA = bytes(range(256)) * 8
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "merge_rl/weights"


def test_a_file_is_fetched_once_and_announced(web: FileServer, cache: Path) -> None:
    files = {"a/b": PublicFile(url=web.put("/x/w.bin", DATA), size=len(DATA), sha256=SHA)}
    said: list[str] = []
    found = fetch_public("a/b", files, announce=said.append)
    assert found.path == cache / "a--b/w.bin"
    assert (found.path.read_bytes(), found.sha256) == (DATA, SHA)
    again = fetch_public("a/b", files, announce=said.append)
    assert again.path == found.path
    assert len(web.asked("GET")) == 1
    assert said == [f"downloading a/b (0 MB) to {found.path}"]


def test_a_damaged_copy_is_fetched_anew(web: FileServer, cache: Path) -> None:
    files = {"w": PublicFile(url=web.put("/w.bin", DATA), size=len(DATA), sha256=SHA)}
    path = fetch_public("w", files).path
    path.write_bytes(DATA[::-1])
    assert fetch_public("w", files).path.read_bytes() == DATA
    assert len(web.asked("GET")) == 2


def test_a_file_pinned_by_its_address_alone(web: FileServer) -> None:
    files = {"w": PublicFile(url=web.put("/commit/w.bin", DATA), size=len(DATA), sha256=None)}
    assert fetch_public("w", files).sha256 == SHA
    assert fetch_public("w", files).sha256 == SHA
    assert len(web.asked("GET")) == 1


def test_other_files_are_refused(web: FileServer, cache: Path) -> None:
    url = web.put("/w.bin", DATA)
    with pytest.raises(HashMismatchError, match=f"SHA-256 {SHA}, expected {'0' * 64}"):
        fetch_public("w", {"w": PublicFile(url=url, size=len(DATA), sha256="0" * 64)})
    with pytest.raises(DownloadError, match="announces 2048 bytes, expected 7"):
        fetch_public("w", {"w": PublicFile(url=url, size=7, sha256=SHA)})
    assert not (cache / "w/w.bin").exists()
    with pytest.raises(UnknownNameError, match="public weights 'facebook/dinov2-larg'; did you"):
        fetch_public("facebook/dinov2-larg")


@pytest.mark.parametrize("name", sorted(PUBLIC_FILES))
def test_every_file_is_pinned(name: str) -> None:
    file = PUBLIC_FILES[name]
    assert file.url.startswith("https://")
    assert file.size > 2**20
    if file.sha256 is None:
        assert re.search(r"/resolve/[0-9a-f]{40}/", file.url)
    else:
        assert re.fullmatch("[0-9a-f]{64}", file.sha256)


def test_inception_carries_its_hash_in_its_name() -> None:
    file = PUBLIC_FILES["inception-2015-12-05"]
    assert file.sha256 is not None
    assert file.url.endswith(f"-{file.sha256[:8]}.pth")


def test_the_cache_is_where_the_system_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == Path.home() / ".cache/merge_rl/weights"
