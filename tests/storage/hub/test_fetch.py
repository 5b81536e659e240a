"""Fetching from real servers: what is asked, what is kept, and how it goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from merge_rl.errors import CheckpointError, ConfigError, DownloadError, HubError, UnknownNameError
from merge_rl.interfaces import NullTracker, Tracker
from merge_rl.storage.checkpoints.catalogue import Catalogue, KnownSet
from merge_rl.storage.checkpoints.checkpoint_set import open_checkpoints
from merge_rl.storage.files.atomic import save_tensors
from merge_rl.storage.hub.fetch import FetchResult, run_fetch
from merge_rl.storage.hub.fetch_plan import plan_fetch
from merge_rl.storage.hub.fetch_sources import Selection, find_source
from tests.hub_server import Cut, FileServer, HubServer

NIMG = (1024, 2048, 3072)
WIDTHS = (0.05, 0.1)


class Result(NamedTuple):
    written: Sequence[Path]
    skipped: Sequence[Path]


class FakeConverter:
    """Makes NAME.safetensors of NAME.pkl; remembers what it was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, bool, str | None, str | None]] = []

    def __call__(
        self, sources: Path, folder: Path, /, *, delete_source: bool, name: str | None,
        licence: str | None, tracker: Tracker | None,
    ) -> Result:  # fmt: skip
        self.calls.append((sources.name, delete_source, name, licence))
        if sources.read_bytes().startswith(b"bad"):
            raise CheckpointError(f"{sources}: no such checkpoint")
        target = folder / f"{sources.stem}.safetensors"
        save_tensors(target, {"w": torch.tensor(list(sources.read_bytes()[:8]))})
        if delete_source:
            sources.unlink()
        return Result([target], [])


class Heard(NullTracker):
    """Adds up what was advanced in each phase."""

    def __init__(self) -> None:
        self.phases: dict[str, tuple[int, int]] = {}
        self._name = ""

    def phase(self, name: str, total: int) -> None:
        self._name = name
        self.phases[name] = (total, 0)

    def advance(self, count: int) -> None:
        total, done = self.phases[self._name]
        self.phases[self._name] = (total, done + count)


def file_names() -> list[str]:
    return [f"set-{nimg // 1000:07d}-{std:.3f}.pkl" for nimg in NIMG for std in WIDTHS]


def data_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest() * 5000  # 160 kB, another for each


@pytest.fixture
def known(web: FileServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """A set of the catalogue whose six files this server has; its name."""
    for name in file_names():
        web.put(f"/set/{name}", data_of(name))
    item = KnownSet(
        name="known-set", family="edm2", kind="raw", dataset="none", resolution=8, licence="MIT",
        nimg=NIMG, ema_std=WIDTHS, pattern="set-{kimg:07d}-{ema_std:.3f}.pkl",
        base_url=f"{web.url}/set/",
    )  # fmt: skip
    embedded = KnownSet(
        name="inside", family="edm2", kind="embedded", dataset="none", resolution=8, licence="MIT",
        embedded=True,
    )  # fmt: skip
    catalogue = Catalogue(sets=(item, embedded))
    monkeypatch.setattr("merge_rl.storage.hub.fetch_sources.load_catalogue", lambda: catalogue)
    return item.name


def fetch(
    name: str,
    folder: Path,
    converter: FakeConverter | None = None,
    choose: Selection | None = None,
    **options: Any,
) -> FetchResult:
    plan = plan_fetch(name, folder, selection=choose, **options)
    return run_fetch(plan, convert=converter or FakeConverter())


def left_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# -------------------------------------------------------------------------- catalogued sets


def test_a_plan_says_what_it_takes_and_writes_nothing(
    known: str, web: FileServer, tmp_path: Path
) -> None:
    selection = Selection(ema_std=(0.05,), last=2)
    plan = plan_fetch(known, tmp_path / "out", selection=selection)
    assert [file.name for file in plan.files] == ["set-0000002-0.050.pkl", "set-0000003-0.050.pkl"]
    assert (plan.size, plan.to_download, plan.disk_needed) == (320_000, 320_000, 640_000)
    assert 0 < plan.disk_free <= shutil.disk_usage(tmp_path).free * 2
    assert (plan.source.licence, plan.done) == ("MIT", frozenset())
    assert not (tmp_path / "out").exists()
    assert [r.headers["Range"] for r in web.requests] == ["bytes=0-0"] * 2
    plan = plan_fetch(known, tmp_path / "out", selection=selection, delete_original=True)
    assert plan.disk_needed == 320_000 + 160_000


def test_files_are_converted_one_by_one_and_recorded(
    known: str, web: FileServer, tmp_path: Path
) -> None:
    converter, heard, out = FakeConverter(), Heard(), tmp_path / "out"
    plan = plan_fetch(known, out, selection=Selection(last=1))
    result = run_fetch(plan, convert=converter, tracker=heard)
    names = ["set-0000003-0.050", "set-0000003-0.100"]
    assert converter.calls == [(f"{n}.pkl", False, known, "MIT") for n in names]
    assert result.outputs == tuple(out / f"{name}.safetensors" for name in names)
    assert left_in(out) == [
        "fetch.json", *(f"originals/{name}.pkl" for name in names),
        *(f"{name}.safetensors" for name in names),
    ]  # fmt: skip
    assert (out / "originals" / f"{names[0]}.pkl").read_bytes() == data_of(f"{names[0]}.pkl")
    assert set(heard.phases.values()) == {(160_000, 160_000)}
    record = json.loads((out / "fetch.json").read_text())["files"][f"{names[0]}.pkl"]
    assert record["sha256"] == hashlib.sha256(data_of(f"{names[0]}.pkl")).hexdigest()


def test_what_is_here_and_sound_is_not_fetched_again(
    known: str, web: FileServer, tmp_path: Path
) -> None:
    out, choose = tmp_path / "out", Selection(ema_std=(0.05,))
    fetch(known, out, choose=choose, delete_original=True)
    assert left_in(out) == ["fetch.json", *(f"set-000000{k}-0.050.safetensors" for k in (1, 2, 3))]
    (out / "set-0000001-0.050.safetensors").unlink()
    damaged = out / "set-0000002-0.050.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    web.requests.clear()

    plan = plan_fetch(known, out, selection=Selection(ema_std=(0.05,)))
    assert plan.done == {"set-0000003-0.050.pkl"}
    assert plan.to_download == 320_000
    result = run_fetch(plan, convert=FakeConverter())
    assert (len(result.fetched), result.kept) == (2, ("set-0000003-0.050.pkl",))
    bodies = [r.path for r in web.requests if r.headers.get("Range") != "bytes=0-0"]
    assert bodies == ["/set/set-0000001-0.050.pkl", "/set/set-0000002-0.050.pkl"]
    # The same folder takes more of the same set.
    assert len(fetch(known, out).fetched) == 3


def test_a_kept_original_serves_again(known: str, web: FileServer, tmp_path: Path) -> None:
    out, choose = tmp_path / "out", Selection(last=1, ema_std=(0.05,))
    fetch(known, out, choose=choose)
    (out / "set-0000003-0.050.safetensors").unlink()
    web.requests.clear()
    assert len(fetch(known, out, choose=choose).outputs) == 1
    assert [r.headers.get("Range") for r in web.requests] == ["bytes=0-0"]


def test_a_file_that_changed_at_the_source_is_fetched_again(
    known: str, web: FileServer, tmp_path: Path
) -> None:
    out, choose = tmp_path / "out", Selection(last=1, ema_std=(0.05,))
    fetch(known, out, choose=choose)
    changed = data_of("another")
    web.put("/set/set-0000003-0.050.pkl", changed, etag='"two"')
    assert len(fetch(known, out, choose=choose).fetched) == 1
    assert (out / "originals" / "set-0000003-0.050.pkl").read_bytes() == changed


class Interrupt(Heard):
    """Ctrl-C in the middle of the second file."""

    def advance(self, count: int) -> None:
        super().advance(count)
        if "0000002" in self._name and self.phases[self._name][1] >= 50_000:
            raise KeyboardInterrupt


def test_an_interrupted_fetch_goes_on_in_mid_file(
    known: str, web: FileServer, tmp_path: Path
) -> None:
    out, choose = tmp_path / "out", Selection(ema_std=(0.1,))
    plan = plan_fetch(known, out, selection=choose)
    with pytest.raises(KeyboardInterrupt):
        run_fetch(plan, convert=FakeConverter(), tracker=Interrupt())
    assert left_in(out) == [
        "fetch.json", "originals/set-0000001-0.100.pkl", "originals/set-0000002-0.100.pkl.part",
        "originals/set-0000002-0.100.pkl.part.json", "set-0000001-0.100.safetensors",
    ]  # fmt: skip
    done = (out / "originals" / "set-0000002-0.100.pkl.part").stat().st_size
    web.requests.clear()
    plan = plan_fetch(known, out, selection=choose)
    assert plan.to_download == 2 * 160_000 - done
    run_fetch(plan, convert=FakeConverter())
    ranges = [request.headers.get("Range") for request in web.requests]
    assert [each for each in ranges if each != "bytes=0-0"] == [f"bytes={done}-", None]
    for name in ("set-0000002-0.100.pkl", "set-0000003-0.100.pkl"):
        assert (out / "originals" / name).read_bytes() == data_of(name)


def test_a_failed_conversion_keeps_what_was_done(
    known: str, web: FileServer, tmp_path: Path
) -> None:
    web.put("/set/set-0000002-0.050.pkl", b"bad" + data_of("x"))
    out, choose = tmp_path / "out", Selection(ema_std=(0.05,))
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        fetch(known, out, choose=choose, delete_original=True)
    assert left_in(out) == [
        "fetch.json", "originals/set-0000002-0.050.pkl", "set-0000001-0.050.safetensors",
    ]  # fmt: skip
    web.put("/set/set-0000002-0.050.pkl", data_of("x"), etag='"good"')
    assert len(fetch(known, out, choose=choose).kept) == 1


def test_a_missing_file_is_found_before_anything_is_downloaded(
    known: str, web: FileServer, tmp_path: Path
) -> None:
    del web.pages["/set/set-0000002-0.100.pkl"]
    with pytest.raises(DownloadError, match=r"set-0000002-0\.100\.pkl: the server answered 404"):
        plan_fetch(known, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_refused_before_the_first_byte(
    known: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_fetch(known, tmp_path / "out", selection=Selection(last=1))

    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(
        "merge_rl.storage.hub.fetch_plan.shutil.disk_usage", lambda _: Usage(639_999)
    )
    with pytest.raises(DownloadError, match="expected 640,000 bytes of free disk, found 639,999"):
        run_fetch(plan, convert=FakeConverter())
    assert not (tmp_path / "out").exists()


def test_other_folders_are_not_written_into(known: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="expected a new or an empty folder"):
        plan_fetch(known, tmp_path / "full")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="expected a new or an empty folder"):
        plan_fetch(known, tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "fetch.json").write_text('{"source": "another", "files": {}}')
    with pytest.raises(
        ConfigError, match="holds files of 'another', expected those of 'known-set'"
    ):
        plan_fetch(known, tmp_path / "other")
    (tmp_path / "other" / "fetch.json").write_text('{"source": "known-set", "files": [1]}')
    with pytest.raises(CheckpointError, match="damaged; delete it, then fetch again"):
        plan_fetch(known, tmp_path / "other")
    outside = {"size": 1, "version": None, "sha256": "", "outputs": {"../x": ""}}
    (tmp_path / "other" / "fetch.json").write_text(
        json.dumps({"source": "known-set", "files": {"a": outside}})
    )
    with pytest.raises(CheckpointError, match="expected a path inside the folder"):
        plan_fetch(known, tmp_path / "other")


def test_names_that_mean_nothing_are_refused(known: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown checkpoint set 'known-sets'; did you mean"):
        find_source("known-sets")
    with pytest.raises(
        ConfigError, match="inside comes with the package; write it with: mergerl d"
    ):
        find_source("inside")
    with pytest.raises(ConfigError, match="a revision belongs to a repository"):
        find_source(known, revision="main")
    with pytest.raises(ConfigError, match="a hash belongs to one address"):
        find_source("user/repo", sha256="0" * 64)
    with pytest.raises(ConfigError, match="two revisions are given, 'a' and 'b'"):
        find_source("user/repo@a", revision="b")
    for url in ("https://h/..%2fx.pkl", "https://h/", "https://h/a.zip", "https://h/.pkl"):
        with pytest.raises(DownloadError, match=r"expected the address of a \.pkl, \.pt"):
            find_source(url)
    with pytest.raises(ConfigError, match="expected a SHA-256 of 64 hexadecimal digits"):
        find_source("https://h/a.pkl", sha256="12")


# ------------------------------------------------------------------------------ one address


def test_one_address_with_its_hash(web: FileServer, tmp_path: Path) -> None:
    url = web.put("/some/model.pt", data_of("a"))
    digest = hashlib.sha256(data_of("a")).hexdigest()
    result = fetch(f"{url}?key=secret", tmp_path / "out", sha256=digest)
    assert result.outputs == (tmp_path / "out" / "model.safetensors",)
    assert "secret" not in (tmp_path / "out" / "fetch.json").read_text()
    with pytest.raises(CheckpointError, match="expected 0000"):
        fetch(url, tmp_path / "other", sha256="0" * 64)


# ------------------------------------------------------------------------------ repositories


def put_set(hub: HubServer, folder: Path, **more: bytes) -> Mapping[str, bytes]:
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
    return hub.add_repo("user/set", {**files, **more}).files


def test_a_converted_set_comes_as_it_is(hub: HubServer, shared_tiny: Path, tmp_path: Path) -> None:
    published = put_set(hub, shared_tiny)
    out = tmp_path / "out"
    result = fetch("user/set", out, choose=Selection(track="raw", last=2))
    assert result.outputs[0] == out / "raw/tiny-0000300.safetensors"
    opened = open_checkpoints(out)
    assert opened.names == ("tiny-0000300", "tiny-0000400")
    assert all(check.ok and check.recorded for check in opened.verify())
    assert (opened.licence, opened.tracks) == ("MIT", ["raw"])
    for path in (opened.defaults.reference, opened.defaults.extractor_weights):
        assert path is not None
        assert path.read_bytes() == published[path.relative_to(out).as_posix()]
    assert not [name for name in left_in(out) if name.startswith(".")]
    # More of the set joins it, and nothing comes twice.
    hub.requests.clear()
    result = fetch("user/set", out, choose=Selection(track="ema"))
    assert len(result.fetched) == 4
    assert len(open_checkpoints(out)) == 6
    assert len(hub.asked("GET", "/cdn/")) == 4


def test_snapshots_of_a_repository_are_converted(hub: HubServer, tmp_path: Path) -> None:
    files = {f"snaps/network-snapshot-{k:07d}-0.050.pkl": data_of(str(k)) for k in (0, 1, 2)}
    files["training-state-0000002.pt"] = b"optimiser"
    repo = hub.add_repo("user/run", {**files, "README.md": b"# run"}, private=True)
    converter, out = FakeConverter(), tmp_path / "out"
    result = fetch("user/run", out, converter, revision=repo.commits[0], delete_original=True)
    assert [call[:3] for call in converter.calls] == [
        (f"network-snapshot-{k:07d}-0.050.pkl", True, "user/run") for k in (1, 2)
    ]
    assert len(result.outputs) == 2
    assert left_in(out) == ["fetch.json", *(path.name for path in result.outputs)]
    # Nothing has changed: one look at the repository is all.
    hub.requests.clear()
    assert fetch("user/run", out).fetched == ()
    assert [request.path for request in hub.requests] == ["/api/models/user/run"]


def test_repositories_with_nothing_to_fetch_are_refused(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("user/text", {"README.md": b"# text"})
    with pytest.raises(
        HubError, match=r"the repository has no \.safetensors, \.pkl, \.pt, \.pth or \.ckpt"
    ):
        plan_fetch("user/text", tmp_path / "out")
    with pytest.raises(HubError, match="user/none: no such repository on the Hub"):
        plan_fetch("user/none", tmp_path / "out")
    hub.add_repo("user/lies", {"checkpoints_manifest.yaml": (
        b"version: 1\nmodel: {model: edm2}\ncheckpoints: [{file: a.safetensors}]\n"
    )})  # fmt: skip
    with pytest.raises(HubError, match=r"the manifest lists 'a\.safetensors', not there"):
        plan_fetch("user/lies", tmp_path / "out")


# --------------------------------------------------------------------------- the real thing


def test_a_snapshot_becomes_a_set_that_opens(web: FileServer, golden: Path, tmp_path: Path) -> None:
    snapshot = golden / "edm2" / "snapshot" / "tiny_snapshot.pkl"
    url = web.put("/edm2-tiny-0002048-0.050.pkl", snapshot.read_bytes())
    web.fail("GET", "edm2-tiny", Cut(0))
    out = tmp_path / "out"
    result = run_fetch(plan_fetch(url, out, delete_original=True))
    opened = open_checkpoints(out)
    assert (opened.paths, opened.nimg, opened.ema_std) == (result.outputs, [2048000], [0.05])
    assert all(check.ok and check.recorded for check in opened.verify())
    assert left_in(out) == ["checkpoints_manifest.yaml", "edm2-tiny-0002048-0.050.safetensors",
                            "fetch.json"]  # fmt: skip
    assert plan_fetch(url, out).todo == ()
