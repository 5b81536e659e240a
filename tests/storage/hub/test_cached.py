"""Names of the Hub in the place of sets: what is fetched, how often, and what is said before."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextvars import Context
from pathlib import Path
from typing import Any

import pytest
import torch

import merge_rl as mrl
from merge_rl.errors import BusyError, HashMismatchError, HubError, UnknownNameError
from merge_rl.storage.checkpoints import open_checkpoints, open_model_file
from merge_rl.storage.files.atomic import save_tensors
from merge_rl.storage.files.locks import locked
from merge_rl.storage.hub import cached_model
from merge_rl.storage.hub.cached import is_set_of_hub, local_place, local_set
from merge_rl.storage.hub.fetch import run_fetch
from merge_rl.storage.runs import RunDir
from merge_rl.workflows.assembly import find_model
from tests.cli.test_given import Notes, said
from tests.fixtures import TinyConfig
from tests.hub_server import HubServer, Repo

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.usefixtures("no_network_here"),
]

Mergerl = Callable[..., Any]


@pytest.fixture
def published(hub: HubServer, shared_tiny: Path) -> Repo:
    """The tiny set: four raw and four EMA checkpoints, a manifest, and two more files."""
    paths = [path for path in shared_tiny.rglob("*") if path.is_file()]
    return hub.add_repo(
        "user/set", {p.relative_to(shared_tiny).as_posix(): p.read_bytes() for p in paths}
    )


def sent(hub: HubServer) -> list[str]:
    """Names of the checkpoints that went out."""
    return [re.sub(r".*/", "", r.path) for r in hub.asked("GET", "/cdn/.*tiny-")]


def test_a_name_is_the_whole_set_and_is_fetched_once(
    hub: HubServer, published: Repo, shared_tiny: Path
) -> None:
    heard = Notes()
    folder = local_set("user/set", heard)
    assert folder.name == f"set@{published.commits[-1][:12]}"
    assert [c.sha256 for c in open_checkpoints(folder).verify()] == [
        c.sha256 for c in open_checkpoints(shared_tiny).verify()
    ]
    manifest_apart = [data for name, data in published.files.items() if name[-5:] != ".yaml"]
    size = sum(map(len, manifest_apart))
    assert heard.texts == [
        f"user/set: {len(manifest_apart)} files to download from the Hub, {size / 1e6:,.1f} MB"
    ]
    hub.requests.clear()
    assert local_set("user/set", heard) == folder
    assert [request.path for request in hub.requests] == ["/api/models/user/set"]
    assert len(heard.texts) == 1


def test_of_a_set_only_the_newest_comes_where_one_model_is_meant(
    hub: HubServer, published: Repo, shared_tiny: Path
) -> None:
    newest = open_checkpoints(shared_tiny).paths[-1].name
    meant = find_model("user/set")
    assert (sent(hub), meant.path.name) == ([newest], newest)
    assert "the newest of the set" in str(meant.note)
    raw = find_model("user/set", "raw").path
    assert sent(hub)[1:] == [raw.name] == ["tiny-0000400.safetensors"]
    with pytest.raises(UnknownNameError, match="unknown track 'row'"):
        find_model("user/set", "row")
    # The rest joins them.
    assert len(open_checkpoints(local_set("user/set"))) == 8
    assert len(sent(hub)) == len(set(sent(hub))) == 8
    assert find_model("user/set", "raw").path == raw


def test_another_commit_is_another_folder(hub: HubServer, published: Repo) -> None:
    pinned = f"user/set@{published.commits[0]}"
    first = local_set(pinned)
    published.files["README.md"] = b"# new"
    published.commit("second")
    second = local_set("user/set")
    assert first != second
    assert (second / "README.md").read_bytes() == b"# new"
    assert not (first / "README.md").exists()  # a search that began there goes on there
    hub.requests.clear()
    assert local_set(pinned) == first
    assert hub.requests == []  # a commit stays what it is


def test_without_a_connection_what_came_whole_serves(hub: HubServer, published: Repo) -> None:
    newest = local_place("user/set")
    hub.stop()
    assert local_place("user/set") == newest
    with pytest.raises(HubError, match="no connection .*no copy is stored here"):
        local_set("user/set")
    with pytest.raises(HubError, match="no connection .*no copy is stored here"):
        local_place("user/set@other")


def test_much_is_not_fetched_on_the_way(
    hub: HubServer, published: Repo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    newest = local_place("user/set")
    monkeypatch.setattr(cached_model, "LIMIT_BYTES", 1000)
    with pytest.raises(HubError, match=r"and more than .* run mergerl fetch user/set DIR, then"):
        local_set("user/set")
    assert len(sent(hub)) == 1
    assert local_place("user/set") == newest  # what is here needs no download
    save_tensors(tmp_path / "model.safetensors", {"a": torch.ones(1000)})
    hub.add_repo("user/one", {"model.safetensors": (tmp_path / "model.safetensors").read_bytes()})
    with pytest.raises(HubError, match="user/one has 1 file to download, 0.0 GB, and more than"):
        local_place("user/one")
    assert not hub.asked("GET", "/cdn/.*/model.safetensors")


def test_snapshots_are_converted_and_originals_leave(
    hub: HubServer, golden: Path, tmp_path: Path
) -> None:
    data = (golden / "edm2/snapshot/tiny_snapshot.pkl").read_bytes()
    names = [f"edm2-tiny-000{nimg}-0.050.pkl" for nimg in (2048, 4096)]
    hub.add_repo("user/run", dict.fromkeys(names, data))
    assert is_set_of_hub("user/run")
    folder = local_set("user/run")
    assert open_checkpoints(folder, distinct=False).names == tuple(name[:-4] for name in names)
    assert not list(folder.rglob("*.pkl"))
    assert find_model("user/run").path == folder / "edm2-tiny-0004096-0.050.safetensors"


def test_damaged_bytes_are_refused_and_nothing_is_taken_for_whole(
    hub: HubServer, published: Repo
) -> None:
    name = next(name for name in published.files if name.endswith("tiny-0000300.safetensors"))
    hub.conditions[name] = lambda data: data[:-1] + b"?"
    with pytest.raises(HashMismatchError, match="tiny-0000300.safetensors: the file that came"):
        local_set("user/set")
    hub.conditions.clear()
    assert all(check.ok for check in open_checkpoints(local_set("user/set")).verify())


def test_another_process_that_fetches_is_waited_for(
    hub: HubServer, published: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("merge_rl.storage.hub.cached.time", Clock(pauses))
    left = iter([True, True])

    def busy_at_first(plan: Any, **options: Any) -> Any:
        if next(left, False):
            raise BusyError("DIR is being written by another process; wait for it, or end it")
        return run_fetch(plan, **options)

    monkeypatch.setattr("merge_rl.storage.hub.cached.run_fetch", busy_at_first)
    heard = Notes()
    assert len(open_checkpoints(local_set("user/set", heard))) == 8
    assert pauses == [1.0, 1.0]
    waiting = [text for text in heard.texts if text.startswith("waiting: DIR is being written")]
    assert len(waiting) == 1


class Clock:
    """Sleeps not at all, and remembers for how long."""

    def __init__(self, pauses: list[float]) -> None:
        self.sleep = pauses.append


def test_a_writer_is_told_from_other_refusals(tmp_path: Path) -> None:
    def take() -> None:
        with locked(tmp_path):
            raise AssertionError("held twice")

    with locked(tmp_path), pytest.raises(BusyError):
        Context().run(take)


def test_a_cache_that_cannot_be_written_says_what_moves_it(
    hub: HubServer, published: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(HubError, match="cannot be written.*; XDG_CACHE_HOME moves the folder"):
        local_set("user/set")


# ---------------------------------------------------------------------------------- commands


def test_commands_take_names_of_sets_and_say_so(
    published: Repo, mergerl: Mergerl, shared_tiny: Path
) -> None:
    err = said(mergerl("inspect", "user/set"))
    assert "user/set: 11 files to download from the Hub" in err
    folder = local_set("user/set")
    took = f"user/set: took the set of the Hub, {folder}"
    assert took in err
    err = said(mergerl("merge", "user/set", "m", "--uniform", "--track", "raw"))
    assert took in err
    assert "to download" not in err
    plain = mrl.merge(open_checkpoints(shared_tiny, track="raw"), [0.25] * 4)
    torch.testing.assert_close(open_model_file("m").weights, plain, rtol=0, atol=0)
    newest = open_checkpoints(folder).paths[-1].relative_to(folder)
    assert f"user/set: took {newest}, the newest of the set {folder}" in said(
        mergerl("sample", "user/set", "--num-images", 2)
    )
    ended = mergerl("evaluate", "user/set", "--num-images", 4, "--repeats", 2, "--json")
    assert f"took {newest}, the newest" in said(ended)
    assert "reference" in json.loads(ended.out)["fid"]
    searched = mergerl("plan", "user/set", "--searcher", "nothing")
    assert took in " ".join(searched.err.split())


@pytest.mark.parametrize("command", [["inspect"], ["sample", "--num-images", 2], ["push", "me/x"]])
def test_a_command_lists_a_repository_once(
    command: list[object], hub: HubServer, published: Repo, mergerl: Mergerl
) -> None:
    also = {"push": ["--dry-run"], "sample": ["--force"]}.get(str(command[0]), [])
    for _ in range(2):  # fetched, and from here
        hub.requests.clear()
        ended = mergerl(command[0], "user/set", *command[1:], *also)
        assert ended.code == 0, ended.err
        assert [r.path for r in hub.asked("GET", "/api/models/user/set.*")] == [
            "/api/models/user/set"
        ]
        published.commit("another")  # of which the next command hears


def test_a_search_of_a_name_runs_and_goes_on_from_where_it_lies(
    published: Repo, hub: HubServer, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    config = tiny_config(Path("user/set"))
    found = mrl.optimize("user/set", out=tmp_path / "run", config=config, progress=False)
    folder = local_set("user/set")
    assert found.run_dir == tmp_path / "run"
    assert RunDir(found.run_dir).config().checkpoints == str(folder)
    hub.stop()
    again = mrl.resume(found.run_dir, progress=False)
    assert isinstance(again, mrl.OptimizeResult)
    assert again.coefficients.tolist() == found.coefficients.tolist()


def test_a_slip_names_the_path_and_the_hub(hub: HubServer, mergerl: Mergerl) -> None:
    for command in (["optimize"], ["merge", "m", "--uniform"], ["inspect"], ["sample"]):
        ended = mergerl(command[0], "digits/edm3", *command[1:])
        assert ended.code == 1
        assert ended.err == (
            "error: digits/edm3: no such file or folder, and not from the Hub: digits/edm3: no "
            "such repository on the Hub, or private and not readable\n"
        )
