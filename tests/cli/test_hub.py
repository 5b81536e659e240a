"""`mergerl fetch` and `mergerl push`: what they print, ask and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

import merge_rl as mrl
from tests.children import Child
from tests.hub_server import TOKEN, Cut, FileServer, HubServer

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class Ended(NamedTuple):
    """How a command ended, as the fixture `mergerl` gives it."""

    code: int
    out: str
    err: str


Mergerl = Callable[..., Ended]
Fork = Callable[..., Child]


@pytest.fixture
def snapshot(web: FileServer, golden: Path) -> str:
    """Address of a small EDM2 snapshot."""
    data = (golden / "edm2" / "snapshot" / "tiny_snapshot.pkl").read_bytes()
    return web.put("/edm2-tiny-0002048-0.050.pkl", data)


@pytest.fixture
def model(shared_tiny: Path, tmp_path: Path) -> Path:
    """A model folder."""
    opened = mrl.open_checkpoints(shared_tiny, track="raw")
    weights = mrl.merge(opened, [0.25] * 4)
    return mrl.save_model(tmp_path / "model", weights, opened.config)


# ------------------------------------------------------------------------------------ fetch


def test_fetch_shows_the_size_and_asks(
    mergerl: Mergerl, snapshot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = mergerl("fetch", snapshot, "out")
    assert ended.code == 1
    assert "error: expected --yes to download" in ended.err
    assert "1 files" in ended.out
    assert "licence: not stated" in ended.out

    asked: list[str] = []
    answer = False

    def confirm(text: str, err: bool) -> bool:
        asked.append(text)
        return answer

    monkeypatch.setattr(typer, "confirm", confirm)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    ended = mergerl("fetch", snapshot, "out")
    assert (ended.code, len(asked)) == (1, 1)
    assert "nothing was downloaded" in ended.err
    assert not Path("out").exists()
    answer = True
    assert mergerl("fetch", snapshot, "out").code == 0
    assert Path("out/originals/edm2-tiny-0002048-0.050.pkl").is_file()
    # Nothing to download, nothing to ask.
    ended = mergerl("fetch", snapshot, "out")
    assert (ended.code, len(asked)) == (0, 2)
    assert "0 files fetched, 1 were there already" in ended.out


def test_fetch_speaks_json(mergerl: Mergerl, snapshot: str) -> None:
    ended = mergerl("fetch", snapshot, "out", "--dry-run", "--json")
    planned = json.loads(ended.out)
    assert (ended.code, planned["files"][0]["nimg"]) == (0, 2048000)
    assert planned["bytes"] == planned["bytes_to_download"] < planned["disk_needed"]
    assert not Path("out").exists()
    ended = mergerl("fetch", snapshot, "out", "--yes", "--delete-original", "--json")
    done = json.loads(ended.out)
    assert (ended.code, done["kept"]) == (0, [])
    assert done["outputs"] == ["out/edm2-tiny-0002048-0.050.safetensors"]
    assert not Path("out/originals").exists()
    assert mergerl("inspect", "out").code == 0


def test_fetch_goes_on_in_another_process(
    fork: Fork, web: FileServer, snapshot: str, tmp_path: Path
) -> None:
    size = len(web.pages["/edm2-tiny-0002048-0.050.pkl"].data)
    web.fail("GET", "edm2-tiny", 503, Cut(1), Cut(size // 2), 404)
    first = fork("fetch", snapshot, "out", "--yes")
    _, err = first.communicate(timeout=60)
    assert first.returncode == 1
    assert "the server answered 404" in err
    assert (tmp_path / "out/originals/edm2-tiny-0002048-0.050.pkl.part").stat().st_size == size // 2
    second = fork("fetch", snapshot, "out", "--yes", "--json")
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0, err
    assert json.loads(out)["bytes_to_download"] == size - size // 2
    assert web.asked("GET")[-1].headers["Range"] == f"bytes={size // 2}-"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["edm2-img512-xs-raws"], "unknown checkpoint set 'edm2-img512-xs-raws'; did you mean"),
        (["digits-edm2"], "digits-edm2 comes with the package; write it with: mergerl demo DIR"),
        (["edm2-img512-xs-raw", "--every", "1.5"], "expected a number of images such as"),
        (["edm2-img512-xs-raw", "--last", "0"], "expected last of at least 1, got 0"),
        (["edm2-img512-xs-raw", "--ema-std", "0.2"], "no file has ema_std 0.2"),
        (["http://example.org/a.pkl"], "expected an https address, found 'http'"),
    ],
)
def test_fetch_refuses(
    mergerl: Mergerl, web: FileServer, arguments: list[str], sentence: str
) -> None:
    ended = mergerl("fetch", *arguments[:1], "out", *arguments[1:])
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("error: ")
    assert sentence in ended.err
    assert not Path("out").exists()


# ------------------------------------------------------------------------------------- push


def test_push_lists_in_a_dry_run(mergerl: Mergerl, hub: HubServer, model: Path) -> None:
    ended = mergerl("push", model, "user/repo", "--dry-run")
    assert ended.code == 0
    assert "would push" in ended.out
    assert "model.safetensors" in ended.out
    assert "(private)" in ended.out
    assert hub.requests == []


def test_push_speaks_json(mergerl: Mergerl, hub: HubServer, model: Path) -> None:
    ended = mergerl("push", model, "user/repo", "--public", "--message", "Here", "--json")
    document = json.loads(ended.out)
    repo = hub.repos["user/repo"]
    assert (ended.code, document["private"], repo.private) == (0, False, False)
    assert (document["commit"], repo.messages[-1]) == (repo.commits[-1], "Here")
    assert document["files"] == {name: len(repo.files[name]) for name in document["files"]}
    assert mrl.load_model(document["repo"]) is not None


def test_push_works_in_a_process_of_its_own(fork: Fork, hub: HubServer, model: Path) -> None:
    hub.fail("PUT", "/upload/", Cut(1000))
    process = fork("--debug", "push", model, "user/repo")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "pushed" in out
    assert 'load it: merge_rl.load_model("user/repo")' in out
    assert hub.repos["user/repo"].files["README.md"] == (model / "README.md").read_bytes()
    assert hub.repos["user/repo"].private
    assert TOKEN not in out + err


def test_push_refuses_in_one_sentence(
    fork: Fork, mergerl: Mergerl, hub: HubServer, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "run" / "inputs.json").write_text("{}")
    ended = mergerl("push", "run", "user/repo")
    assert ended == (1, "", "error: run: the run is not finished; go on with: mergerl resume run\n")
    ended = mergerl("push", model, "repo")
    assert ended.err.startswith("error: expected a repository as user/repo or user/repo@revision")
    hub.fail("POST", "/create", 401)
    # With --debug the traceback is shown, and even then no token.
    process = fork("--debug", "push", model, "user/repo")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "HubError: user/repo: the Hub does not accept the token (401)" in err
    assert TOKEN not in out + err
