"""Published weights: fetched once, checked at every use."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from merge_rl.errors import (
    DownloadError,
    HashMismatchError,
    HubError,
    MissingLibraryError,
    UnknownNameError,
)
from merge_rl.workflows.assembly.extractors import build_extractor
from merge_rl.workflows.assembly.networks import load_autoencoder
from merge_rl.workflows.assembly.published import (
    PUBLIC_FILES,
    PublicFile,
    cache_folder,
    fetch_public,
)
from tests.hub_server import FileServer, HubServer, Repo

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
    assert re.match(r"https://|package://|hf://[\w-]+/[\w-]+@[0-9a-f]{40}/", file.url)
    assert file.size > 2**20
    if file.sha256 is None:
        assert file.url.startswith("hf://")
    else:
        assert re.fullmatch("[0-9a-f]{64}", file.sha256)


@pytest.fixture
def on_hub(hub: HubServer) -> dict[str, PublicFile]:
    repo = hub.repos["user/vae"] = Repo(False)
    repo.files["w.safetensors"] = DATA
    commit = repo.commit("weights")
    address = f"hf://user/vae@{commit}/w.safetensors"
    return {"vae": PublicFile(url=address, size=len(DATA), sha256=SHA)}


def test_a_file_of_the_hub_comes_through_its_client(
    hub: HubServer, on_hub: dict[str, PublicFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    found = fetch_public("vae", on_hub, announce=said.append)
    assert (found.path.read_bytes(), found.sha256) == (DATA, SHA)
    assert "models--user--vae" in found.path.parts
    assert said == ["downloading user/vae (0 MB) to the cache of the Hub's client"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert fetch_public("vae", on_hub, announce=said.append).path == found.path
    assert (len(said), len(hub.requests)) == (1, asked)


def test_a_file_of_the_hub_is_the_pinned_one_or_none(
    hub: HubServer, on_hub: dict[str, PublicFile]
) -> None:
    wrong = {"vae": dataclasses.replace(on_hub["vae"], sha256="0" * 64)}
    with pytest.raises(HashMismatchError, match=f"w.safetensors: .* has the SHA-256 {SHA}"):
        fetch_public("vae", wrong)
    assert fetch_public("vae", on_hub).path.read_bytes() == DATA  # fetched anew
    assert len(hub.asked("GET", "w.safetensors")) == 2


def test_a_file_of_the_hub_that_cannot_be_had(
    hub: HubServer, on_hub: dict[str, PublicFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="user/vae, w.safetensors: .*HF_HUB_OFFLINE is set"):
        fetch_public("vae", on_hub)


def test_a_cache_that_cannot_be_written_names_what_moves_it(
    web: FileServer, on_hub: dict[str, PublicFile], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file/hub"))
    with pytest.raises(HubError, match="file.*: cannot be written .*; HF_HOME moves the cache"):
        fetch_public("vae", on_hub)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    files = {"w": PublicFile(url=web.put("/w.bin", DATA), size=len(DATA), sha256=SHA)}
    with pytest.raises(DownloadError, match="w.bin: cannot be written .*; XDG_CACHE_HOME moves"):
        fetch_public("w", files)


@pytest.mark.parametrize(
    ("library", "load", "extra"),
    [
        ("transformers", lambda: build_extractor("dinov2", None), "dinov2"),
        ("diffusers", lambda: load_autoencoder("sd-vae-sit", shape=(4, 8, 8)), "latent"),
    ],
)
def test_a_missing_library_is_told_before_anything_is_fetched(
    library: str, load: Callable[[], object], extra: str, hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingLibraryError, match=rf"{library}, .*install 'merge_rl\[{extra}\]'"):
        load()
    assert hub.requests == []


def test_inception_carries_its_hash_in_its_name() -> None:
    file = PUBLIC_FILES["inception-2015-12-05"]
    assert file.sha256 is not None
    assert file.url.endswith(f"-{file.sha256[:8]}.pth")


def test_the_cache_is_where_the_system_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == Path.home() / ".cache/merge_rl/weights"
