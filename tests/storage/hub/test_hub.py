"""Pushing and loading with the real client against a server that speaks the Hub's endpoints."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from merge_rl.errors import CheckpointError, HashMismatchError, HubError, RunError
from merge_rl.storage.files.atomic import save_tensors, write_json, write_text
from merge_rl.storage.files.shards import WeightStream, write_weights
from merge_rl.storage.hub.cached import local_model
from merge_rl.storage.hub.cached_model import cached_model
from merge_rl.storage.hub.client import endpoint, scrub
from merge_rl.storage.hub.repository import (
    download_file,
    looks_like_repo,
    open_repository,
    split_repo,
)
from merge_rl.storage.hub.upload import Pushed, list_model
from merge_rl.storage.hub.upload import push_folder as push
from merge_rl.storage.runs import result_of
from tests.hub_server import TOKEN, Cut, Fault, HubServer, Repo

# The client's own upload call is one that its HTTP library will drop.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CARD = "---\ntags: [merge_rl]\n---\n# A merge\n"


class Waits(list[float]):
    """Keeps what would have been waited."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def state(rows: int = 300) -> dict[str, Tensor]:
    """Four tensors of some 300 kB, each another."""
    return {f"w{i}": torch.arange(rows * 250.0).reshape(rows, 250) + i for i in range(4)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder in three shards, among files that are nobody's business."""
    folder = tmp_path / "model"
    write_weights(folder, WeightStream.of(state()), {}, max_shard_bytes=700_000)
    write_json(folder / "config.json", {"model": "edm2"})
    write_text(folder / "merge.yaml", "version: 1\n")
    write_text(folder / "README.md", CARD)
    (folder / "grid.png").write_bytes(b"\x89PNG grid")
    (folder / "images").mkdir()
    (folder / "images" / "b.jpg").write_bytes(b"jpg")
    for name in (".env", "state.safetensors.bak", "events.jsonl", "notes.txt", ".hidden.png"):
        (folder / name).write_text(f"TOKEN={TOKEN}")
    (folder / ".git").mkdir()
    (folder / ".git" / "config.png").write_text("secret")
    return folder


PUBLISHED = [
    "README.md", "config.json", "grid.png", "images/b.jpg", "merge.yaml",
    "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
]  # fmt: skip


def contents(folder: Path, names: list[str]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def uploaded(repo: Repo) -> dict[str, bytes]:
    return {name: data for name, data in repo.files.items() if name != ".gitattributes"}


# ------------------------------------------------------------------------------------- push


def test_what_is_pushed_comes_back_the_same(hub: HubServer, model: Path, tmp_path: Path) -> None:
    pushed = push(model, "user/repo", message="Better than both")
    repo = hub.repos["user/repo"]
    assert uploaded(repo) == contents(model, PUBLISHED)
    assert (repo.private, repo.messages[-1]) == (True, "Better than both")
    assert (pushed.commit, pushed.private) == (repo.commits[-1], True)
    assert sorted(file.name for file in pushed.files) == PUBLISHED
    assert pushed.size == sum(len(data) for data in uploaded(repo).values())

    repository = open_repository("user/repo")
    for name in PUBLISHED:
        path = download_file(repository, name, tmp_path / "back")
        assert path.read_bytes() == (model / name).read_bytes()
    # The token went to the Hub alone, not to its storage.
    for request in hub.requests:
        sent = {key.lower(): value for key, value in request.headers.items()}
        assert ("authorization" in sent) == (not request.path.startswith(("/upload", "/cdn")))


def test_a_pointer_of_git_lfs_is_not_published(model: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1234\n"
    (model / "config.json").write_text(pointer)
    with pytest.raises(CheckpointError, match=r"config\.json: a Git LFS pointer to .* of 1,234 by"):
        list_model(model)


def test_nothing_leaves_in_a_dry_run(
    hub: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    pushed = push(model, "user/repo", dry_run=True)
    assert isinstance(pushed, Pushed)
    assert pushed.commit is None
    assert {f.name: f.size for f in pushed.files} == {
        name: (model / name).stat().st_size for name in PUBLISHED
    }
    assert hub.requests == []


def test_a_second_push_sends_only_what_changed(hub: HubServer, model: Path) -> None:
    push(model, "user/repo")
    before = len(hub.asked("PUT"))
    push(model, "user/repo")
    assert len(hub.asked("PUT")) == before
    assert len(hub.repos["user/repo"].commits) == 2  # the first commit and one push
    write_text(model / "README.md", CARD + "more\n")
    push(model, "user/repo")
    assert len(hub.asked("PUT")) == before
    assert hub.repos["user/repo"].files["README.md"].endswith(b"more\n")


def test_a_whole_model_takes_the_place_of_shards(
    hub: HubServer, model: Path, tmp_path: Path
) -> None:
    repo = hub.add_repo("user/repo", {"mine.txt": b"kept"}, private=True)
    push(model, "user/repo")
    whole = tmp_path / "whole"
    write_weights(whole, WeightStream.of(state()), {})
    write_text(whole / "README.md", CARD)
    push(whole, "user/repo")
    names = sorted(uploaded(repo))
    assert "model.safetensors" in names
    assert "mine.txt" in names
    assert not [name for name in names if "-of-" in name or "index" in name]


def test_an_upload_cut_in_the_middle_goes_on(hub: HubServer, model: Path) -> None:
    # 15 cuts outlast the client's own attempts (6 for a file), so that ours are tried as well.
    digest = hashlib.sha256((model / PUBLISHED[5]).read_bytes()).hexdigest()
    hub.fail("PUT", digest, *[Cut(100_000)] * 15)
    waits = Waits()
    push(model, "user/repo", wait=waits)
    assert uploaded(hub.repos["user/repo"]) == contents(model, PUBLISHED)
    assert waits == [1.0, 4.0]
    sent = [request.path for request in hub.asked("PUT")]
    assert sum(digest in path for path in sent) == 16
    others = [path for path in sent if digest not in path]
    assert len(others) == len(set(others))  # what had arrived was not sent again


def test_the_next_push_resumes_what_the_last_left(hub: HubServer, model: Path) -> None:
    digest = hashlib.sha256((model / PUBLISHED[6]).read_bytes()).hexdigest()
    hub.fail("PUT", digest, *[Cut(100_000)] * 1000)
    with pytest.raises(HubError, match="user/repo: no connection to the Hub, or it broke"):
        push(model, "user/repo", wait=Waits())
    assert uploaded(hub.repos["user/repo"]) == {}  # no half a model is seen
    hub.faults.clear()
    before = len(hub.asked("PUT"))
    push(model, "user/repo")
    assert [r.path.split("/")[2] for r in hub.asked("PUT")[before:]] == [digest]
    assert uploaded(hub.repos["user/repo"]) == contents(model, PUBLISHED)


def test_large_files_go_up_in_parts(hub: HubServer, model: Path) -> None:
    hub.part_bytes = 200_000
    hub.fail("PUT", "/2$", Cut(50_000))
    push(model, "user/repo", wait=Waits())
    assert uploaded(hub.repos["user/repo"]) == contents(model, PUBLISHED)
    parts = [request.path for request in hub.asked("PUT")]
    assert len(parts) == len(set(parts)) + 1  # the one that was cut


def test_busy_answers_are_tried_again(hub: HubServer, model: Path) -> None:
    waits = Waits()
    hub.fail("POST", "/api/repos/create", 503, 500)
    hub.fail("POST", "/commit/", 502)
    push(model, "user/repo", wait=waits)
    assert waits == [1.0, 4.0, 1.0]
    assert uploaded(hub.repos["user/repo"]) == contents(model, PUBLISHED)


@pytest.fixture
def xet(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The storage protocol that the client prefers, with a folder for its servers."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    monkeypatch.delenv("HF_HUB_DISABLE_XET")
    hub.xet_folder = tmp_path / "xet-storage"
    return hub.xet_folder


def test_the_newer_storage_protocol_works_as_well(
    hub: HubServer, model: Path, xet: Path, tmp_path: Path
) -> None:
    hf_xet = pytest.importorskip("hf_xet")
    large = [model / name for name in PUBLISHED if name.endswith((".safetensors", ".png"))]
    # What the storage would tell the Hub of what has arrived.
    hub.objects |= {hashlib.sha256(p.read_bytes()).hexdigest(): p.read_bytes() for p in large}
    push(model, "user/repo", wait=Waits())
    assert uploaded(hub.repos["user/repo"]) == contents(model, PUBLISHED)
    assert (hub.asked("PUT"), hub.asked("POST", "/batch")) == ([], [])
    assert [path for path in xet.rglob("*") if path.is_file()]

    hashes = hf_xet.hash_files([str(path) for path in large])
    hub.xet_hashes = {p.name: info.hash for p, info in zip(large, hashes, strict=True)}
    seen: list[tuple[int, int]] = []
    path = download_file(
        open_repository("user/repo"), large[0].name, tmp_path / "back",
        lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert path.read_bytes() == next(p for p in large if p.name == path.name).read_bytes()
    assert seen[-1] == (path.stat().st_size,) * 2
    assert hub.asked("GET", "/cdn/") == []


def test_refusals_of_the_newer_storage_are_one_sentence_too(
    hub: HubServer, model: Path, xet: Path
) -> None:
    hub.fail("GET", "/xet-write-token/", *[401] * 99)
    with pytest.raises(HubError, match=r"user/repo: the Hub does not accept the token \(401\)"):
        push(model, "user/repo", wait=Waits())
    hub.faults.clear()
    hub.fail("GET", "/xet-write-token/", *[403] * 99)
    with pytest.raises(HubError, match=r"user/repo: the token has no right to do this \(403\)"):
        push(model, "user/repo", wait=Waits())
    assert uploaded(hub.repos["user/repo"]) == {}


REFUSALS: Mapping[str, tuple[str, str, int, bytes, str]] = {
    "wrong token": (
        "POST", "/create", 401, b"",
        r"the Hub does not accept the token \(401\), it is wrong or expired: run `hf auth login`",
    ),
    "no right": (
        "POST", "/create", 403, b'{"error": "You have read access only"}',
        r"no right to do this \(403\); use one with write access; it says: You have read access",
    ),
    "no right to commit": (
        "POST", "/commit/", 403, b"", r"the token has no right to do this \(403\)",
    ),
    "conflict": (
        "POST", "/commit/", 409, b"",
        r"something else changed the repository at the same time \(409\); run the command again",
    ),
    "broken": (
        "POST", "/batch", 500, b"",
        r"the Hub has a problem of its own \(500\).*what has arrived is not sent again",
    ),
    "down": ("POST", "/preupload/", 503, b"", r"the Hub has a problem of its own \(503\)"),
    "quota": (
        "POST", "/commit/", 403, b'{"error": "Private repository storage limit reached"}',
        r"no storage left for this \(403\); it says: Private repository storage limit",
    ),
    "unpaid": ("POST", "/create", 402, b"", r"no storage left for this \(402\)"),
    "rate": ("POST", "/batch", 429, b"", r"too many requests \(429\); wait some minutes"),
    "teapot": ("POST", "/create", 418, b"", r"the Hub refused with status 418"),
    "bad card": (
        "POST", "/validate-yaml", 400, b'{"errors": [{"message": "no"}]}',
        r"Invalid metadata in README\.md\. - no",
    ),
}  # fmt: skip


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """All that is logged, the client's own too, which it keeps from others."""
    heard, loggers = io.StringIO(), [logging.getLogger(), logging.getLogger("huggingface_hub")]
    handler, levels = logging.StreamHandler(heard), [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    loggers[1].debug("heard")
    assert "heard" in heard.getvalue()
    yield heard
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_clear_sentence(
    hub: HubServer, model: Path, case: str, log: io.StringIO, capfd: pytest.CaptureFixture[str]
) -> None:
    method, path, status, body, sentence = REFUSALS[case]
    echo = {"X-Error-Message": f"no: {TOKEN}"} if case == "teapot" else {}
    hub.fail(
        method, path, *[Fault(status, {**echo, "Content-Type": "application/json"}, body)] * 99
    )
    with pytest.raises(HubError, match=sentence) as caught:
        push(model, "user/repo", wait=Waits())
    message = str(caught.value)
    assert message.startswith("user/repo: ")
    assert "\n" not in message
    assert caught.value.__suppress_context__  # a traceback would show the request's headers
    shown = message + log.getvalue() + "".join(capfd.readouterr())
    assert TOKEN not in shown
    assert "X-Signature" not in shown
    assert uploaded(hub.repos.get("user/repo") or Repo(True)) == {}


def test_without_a_login_the_sentence_says_how(
    hub: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        HubError, match=r"user/repo: not logged in \(401\): run `hf auth login`, or"
    ):
        push(model, "user/repo")
    assert hub.asked("PUT") == []


def test_a_branch_has_to_exist(hub: HubServer, model: Path) -> None:
    with pytest.raises(HubError, match="user/repo: the repository has no such revision"):
        push(model, "user/repo@next")
    with pytest.raises(HubError, match="user/repo: the repository has no such revision"):
        push(model, "user/repo", revision="next")
    assert uploaded(hub.repos["user/repo"]) == {}


def test_no_connection_is_one_sentence(hub: HubServer, model: Path) -> None:
    hub.stop()
    waits = Waits()
    with pytest.raises(
        HubError, match="user/repo: no connection to the Hub, or it broke: .*refused"
    ):
        push(model, "user/repo", wait=waits)
    assert waits == [1.0, 4.0, 16.0]


def test_a_private_push_does_not_go_to_a_public_repository(hub: HubServer, model: Path) -> None:
    repo = hub.add_repo("user/repo", {}, private=False)
    with pytest.raises(HubError, match="exists and is public, expected a private one"):
        push(model, "user/repo")
    assert (hub.asked("PUT"), repo.files) == ([], {})
    assert push(model, "user/repo", private=False).private is False
    assert push(model, "user/new", private=False).private is False
    assert hub.repos["user/new"].private is False


def test_the_token_is_written_nowhere(hub: HubServer, model: Path, tmp_path: Path) -> None:
    for name in (".env", "state.safetensors.bak", "events.jsonl", "notes.txt", ".hidden.png"):
        (model / name).unlink()
    push(model, "user/repo")
    open_repository("user/repo")
    cached = tmp_path / "hf-home"
    found = [p for p in (*model.rglob("*"), *cached.rglob("*")) if p.is_file()]
    assert not [path for path in found if TOKEN.encode() in path.read_bytes()]


def test_tokens_and_signatures_are_taken_out_of_texts(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "hf-home").mkdir()
    (tmp_path / "hf-home" / "token").write_text("stored-secret\n")
    monkeypatch.setenv("HF_TOKEN", "odd.secret")
    text = (
        "a odd.secret b stored-secret c Bearer abc.def-g d hf_ABCDEFGHIJKLMNOPQRSTUVWX e "
        "https://user:pw@host/path?X-Amz-Signature=1234&x=y f\n  g hf_hub_download"
    )
    assert scrub(text) == "a *** b *** c *** d *** e https://***host/path*** f g hf_hub_download"


# --------------------------------------------------------------------------- what is refused


def test_unfinished_runs_and_other_folders_are_refused(tmp_path: Path, model: Path) -> None:
    run = tmp_path / "run"
    write_text(run / "config.yaml", "seed: 1\n")
    write_text(run / "inputs.json", "{}")
    with pytest.raises(RunError, match="the run is not finished; go on with: mergerl resume"):
        result_of(run)
    write_text(run / "result.json", "{}")
    with pytest.raises(RunError, match="the run has no model, expected the folder merged/"):
        result_of(run)
    model.rename(run / "merged")
    assert result_of(run) == run / "merged"
    assert sorted(file.name for file in list_model(result_of(run))) == PUBLISHED
    for name in ("nothing", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(CheckpointError, match="expected model.safetensors, or shards"):
            push(tmp_path / name, "user/repo")


def test_folders_that_are_not_sound_are_refused(model: Path, tmp_path: Path) -> None:
    (model / "README.md").rename(tmp_path / "README.md")
    with pytest.raises(CheckpointError, match=r"expected a model card, README\.md"):
        list_model(model)
    (tmp_path / "README.md").rename(model / "README.md")

    shard = model / "model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-5])
    with pytest.raises(CheckpointError, match="00002.*truncated"):
        list_model(model)
    shard.unlink()
    with pytest.raises(CheckpointError, match="00002.*no such file"):
        list_model(model)
    shard.write_bytes(data)

    index = model / "model.safetensors.index.json"
    kept = index.read_text()
    write_json(index, {"weight_map": {"w0": "state.safetensors"}})
    with pytest.raises(CheckpointError, match=r"expected shards named model-\*-of-\*"):
        list_model(model)
    write_text(index, kept)
    save_tensors(model / "model.safetensors", {"w": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"found both model\.safetensors and"):
        list_model(model)


def test_links_out_of_the_folder_are_not_followed(model: Path, tmp_path: Path) -> None:
    (tmp_path / "private.png").write_text("private")
    (model / "leak.png").symlink_to(tmp_path / "private.png")
    with pytest.raises(CheckpointError, match=r"leak\.png: a link that leaves the folder"):
        list_model(model)


@pytest.mark.parametrize(
    "text",
    ["repo", "a/b/c", "../b", "a/..", "/a/b", "a/b@", "a/.b", "a//b", "a/b c", "a--b/c", "~/b", ""],
)
def test_other_texts_are_no_repositories(text: str) -> None:
    assert not looks_like_repo(text)
    with pytest.raises(HubError, match="expected a repository as user/repo"):
        split_repo(text)


def test_repositories_are_told_from_files() -> None:
    assert split_repo("user/repo@refs/pr/1") == ("user/repo", "refs/pr/1")
    assert split_repo("user/repo.v1") == ("user/repo.v1", None)
    assert not looks_like_repo("out/model.safetensors")
    assert not looks_like_repo("out/snapshot.pkl")


def test_a_token_is_not_sent_over_plain_http(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example.org")
    with pytest.raises(HubError, match="HF_ENDPOINT: .*expected an https address, found 'http'"):
        endpoint()
    with pytest.raises(HubError, match="HF_ENDPOINT"):
        push(model, "user/repo")


# ------------------------------------------------------------------------------------- load


def test_only_what_a_model_needs_is_downloaded_once(hub: HubServer, model: Path) -> None:
    push(model, "user/repo")
    hub.requests.clear()
    folder = cached_model("user/repo")
    wanted = [*PUBLISHED[:2], *PUBLISHED[4:]]  # no pictures
    assert sorted(path.name for path in folder.iterdir()) == wanted
    assert contents(folder, wanted) == contents(model, wanted)
    gets = [r for r in hub.asked("GET") if not r.path.startswith("/api")]
    assert len(gets) == len(wanted)
    assert cached_model("user/repo") == folder
    assert len([r for r in hub.asked("GET") if not r.path.startswith("/api")]) == len(wanted)


def test_a_revision_is_what_it_was(hub: HubServer, model: Path) -> None:
    push(model, "user/repo")
    first = hub.repos["user/repo"].commits[-1]
    (model / "config.json").write_text('{"model": "sit"}')
    push(model, "user/repo")
    assert json.loads((cached_model("user/repo") / "config.json").read_text())["model"] == "sit"
    # This server keeps only the newest files; what it says of the revision is what is asked.
    cached_model(f"user/repo@{hub.repos['user/repo'].commits[-1]}")
    with pytest.raises(HubError, match="user/repo@gone: the repository has no such revision"):
        cached_model("user/repo@gone")
    assert first != hub.repos["user/repo"].commits[-1]


def test_without_a_connection_the_cached_copy_serves(
    hub: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merge_rl.storage.hub.client.PAUSES", ())
    push(model, "user/repo")
    folder = cached_model("user/repo")
    hub.stop()
    assert cached_model("user/repo") == folder
    with pytest.raises(HubError, match="user/other: no connection .*no copy is stored here"):
        cached_model("user/other")


def test_a_local_path_wins_and_paths_are_never_looked_up(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "repo").mkdir()
    assert local_model("user/repo") == Path("user/repo")
    assert local_model(Path("user/other")) == Path("user/other")
    assert local_model("not/there.safetensors") == Path("not/there.safetensors")
    assert hub.requests == []
    with pytest.raises(HubError, match="user/other: no such file or folder, and not from the Hub"):
        local_model("user/other")


def test_repositories_without_one_model_are_refused(hub: HubServer) -> None:
    hub.add_repo("user/set", {"a.safetensors": b"1", "b.safetensors": b"2"})
    with pytest.raises(HubError, match=r"expected one model, found 2 \.safetensors files"):
        cached_model("user/set")
    hub.add_repo("user/none", {"README.md": b"#"})
    with pytest.raises(HubError, match=r"found no \.safetensors file"):
        cached_model("user/none")
    with pytest.raises(HubError, match="user/secret: no such repository on the Hub"):
        cached_model("user/secret")


# --------------------------------------------------------------------------------- downloads


def test_a_download_cut_in_mid_file_is_resumed(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The client goes on after the last whole chunk, of 10 MiB in earnest.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50_000)
    data = bytes(range(256)) * 2000
    hub.add_repo("user/repo", {"a.pkl": data})
    hub.fail("GET", "/cdn/", Cut(210_000), Cut(120_000))
    seen: list[tuple[int, int]] = []
    path = download_file(
        open_repository("user/repo"), "a.pkl", tmp_path,
        lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert path.read_bytes() == data
    asked = [{k.lower(): v for k, v in r.headers.items()} for r in hub.asked("GET", "/cdn/")]
    assert [headers.get("range") for headers in asked] == [None, "bytes=200000-", "bytes=300000-"]
    assert seen[-1] == (len(data), len(data))


HOSTILE = ["../up.safetensors", "/etc/passwd", "a/../../b", "C:\\x", "a\\b", "a\0b", "C:x"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_leave_the_folder_are_refused(hub: HubServer, name: str) -> None:
    hub.add_repo("user/repo", {})
    hub.listing = [{"rfilename": name, "size": 1, "blobId": "0" * 40}]
    with pytest.raises(HubError, match="lists a file outside of its folder"):
        open_repository("user/repo")


def test_links_in_the_target_are_not_written_through(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("user/repo", {"raw/a.pkl": b"data"})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "raw").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link that leaves the folder"):
        download_file(open_repository("user/repo"), "raw/a.pkl", tmp_path / "here")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("name", ["a.pkl", "a.txt"])
def test_other_contents_than_listed_are_refused(hub: HubServer, tmp_path: Path, name: str) -> None:
    hub.add_repo("user/repo", {name: b"as it should be"})
    hub.conditions[name] = lambda data: data.replace(b"should", b"SHOULD")
    with pytest.raises(HashMismatchError, match=rf"user/repo, {name}: the file that came"):
        download_file(open_repository("user/repo"), name, tmp_path)
    assert not (tmp_path / name).exists()


def test_a_longer_body_than_listed_is_stopped(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("user/repo", {"a.pkl": b"x" * 1000})
    hub.conditions["a.pkl"] = lambda data: data * 1000
    with pytest.raises(HubError, match=r"sends more than the 1000 bytes it listed"):
        download_file(open_repository("user/repo"), "a.pkl", tmp_path)
    assert not list(tmp_path.rglob("*.incomplete"))
    assert not (tmp_path / "a.pkl").exists()


def test_a_listing_without_a_commit_is_refused(hub: HubServer) -> None:
    repo = hub.add_repo("user/repo", {})
    repo.commits[:] = ["../../x"]
    with pytest.raises(HubError, match=r"the Hub named no commit, found '\.\./\.\./x'"):
        open_repository("user/repo")
