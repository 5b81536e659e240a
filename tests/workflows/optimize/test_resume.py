"""A run that was interrupted anywhere ends, once resumed, as if it had never been interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
import torch

import merge_rl as mrl
from merge_rl.config.optimize import OptimizeConfig
from merge_rl.config.sampler import SamplerConfig
from merge_rl.errors import CheckpointError, MergeRLError, RunError
from merge_rl.storage.checkpoints.manifest import MANIFEST_NAME
from merge_rl.storage.files.atomic import save_tensors
from merge_rl.storage.files.safetensors_file import read_file
from merge_rl.storage.runs.run_dir import RunDir
from merge_rl.workflows.export import folder as export
from merge_rl.workflows.optimize import resume
from merge_rl.workflows.reference.file import load_reference, save_reference
from merge_rl.workflows.rollout.rollout import MergedRollout
from tests.quick import without_network, without_pages

TinyConfig = Callable[..., OptimizeConfig]
Outcome = Callable[[Path], dict[str, object]]

# Three rounds of 2 candidates after the pool, then 4 + 12 models: 26 rollouts.
SMALL: dict[str, Any] = {
    "budget": 110,
    "merge": {"scale": 0.2},
    "search": {"population": 2},
    "reward": {"pool_size": 20},
    "evaluation": {"num_images": 10, "repeats": 3},
}
# A round less: as many kinds of places, of which all are tried.
SMALLEST = {**SMALL, "budget": 80}


class Tripwire:
    """Raises KeyboardInterrupt at the k-th of the places where a run can stop.

    Places lie before every rollout, and before everything that is written: events, resume points,
    JSON files, each file of the merged model, and when its folder takes its place.
    """

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.limit: int | None = None

    def before(self, place: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            self.reach(place)
            self.passed.append(place)
            return function(*args, **options)

        return wrapped

    def reach(self, place: str) -> None:
        """Called at every place; raises at that of the limit."""
        if len(self.passed) == self.limit:
            self.limit = None  # once: what cleans up passes places too
            raise KeyboardInterrupt(place)

    @contextlib.contextmanager
    def at(self, limit: int | None) -> Iterator[None]:
        """Interrupt after `limit` places, which must be reached; never for None."""
        self.passed, self.limit = [], limit
        if limit is None:
            yield
        else:
            with pytest.raises(KeyboardInterrupt):
                yield


class Branches(Tripwire):
    """Leaves in `kept` what would remain of a run that is interrupted at each of `places`.

    At a place, a forked process is interrupted while this one waits; then the folder is as it was,
    and the run goes on. So all places take one run, not one each.
    """

    def __init__(self, run: Path, kept: Path, places: range) -> None:
        super().__init__()
        self.run, self.kept, self.places = run, kept, places
        self.ends: list[int] = []

    def reach(self, place: str) -> None:
        number = len(self.passed)
        if number not in self.places:
            return
        beside = self.kept / "beside"
        if self.run.exists():  # but for locks, which this process holds all the while
            shutil.copytree(self.run, beside, ignore=shutil.ignore_patterns("*.lock"))
        if (child := os.fork()) == 0:
            self.places = range(0)
            raise KeyboardInterrupt(place)
        self.ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        if self.run.exists():
            self.run.rename(self.kept / str(number))
        if beside.exists():
            beside.rename(self.run)

    def grow(self, run: Callable[[], object]) -> None:
        """Run; a process that is interrupted ends here, with 0 if it learns of it."""
        whole, end = os.getpid(), 1
        try:
            run()
        except KeyboardInterrupt:
            end = 0
        finally:
            if os.getpid() != whole:
                os._exit(end)


@pytest.fixture
def tripwire(monkeypatch: pytest.MonkeyPatch) -> Tripwire:
    return watching(monkeypatch, Tripwire())


Wire = TypeVar("Wire", bound=Tripwire)


def watching(monkeypatch: pytest.MonkeyPatch, wire: Wire) -> Wire:
    """The wire at every place where a run can stop."""
    # A page every few seconds is a place that only slow machines have.
    monkeypatch.setattr("merge_rl.workflows.report.writing.LEAST_SECONDS", float("inf"))
    watched: list[tuple[Any, str]] = [
        (MergedRollout, "features"),
        (RunDir, "append_event"),
        (RunDir, "save_state"),
        (RunDir, "write"),
        (RunDir, "keep_events_before"),
        (export, "write_weights"),
        (export, "write_json"),
        (export, "write_yaml"),
        (export, "write_text"),
        (Path, "replace"),
    ]
    for owner, name in watched:
        monkeypatch.setattr(owner, name, wire.before(name, getattr(owner, name)))
    return wire


def drive(run: Path, config: OptimizeConfig) -> mrl.OptimizeResult:
    """What a user does: start, and once there is a run, resume."""
    if (run / "config.yaml").is_file():
        return resume(run)
    # Stopped before there was a run: nothing is lost but the folder.
    shutil.rmtree(run, ignore_errors=True)
    return mrl.optimize(config.checkpoints, out=run, config=config)


class Whole(NamedTuple):
    """A run that nothing has interrupted."""

    config: OptimizeConfig
    places: list[str]  # where it could have been
    result: mrl.OptimizeResult
    outcome: dict[str, object]


Make = Callable[[Path, OptimizeConfig], Whole]


@pytest.fixture(scope="module")
def run_whole(outcome: Outcome) -> Make:
    def make(run: Path, config: OptimizeConfig) -> Whole:
        with pytest.MonkeyPatch.context() as patch:
            wire = watching(patch, Tripwire())
            result = drive(run, config)
        return Whole(config, list(wire.passed), result, outcome(run))

    return make


@pytest.fixture(scope="module")
def cheap(
    shared_tiny: Path, tiny_config: TinyConfig, run_whole: Make,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[dict[str, Any]], Whole]:  # fmt: skip
    """settings -> a whole run of samples that cost nothing."""

    def made(settings: dict[str, Any]) -> Whole:
        with pytest.MonkeyPatch.context() as patch:
            without_network(patch)
            return run_whole(
                tmp_path_factory.mktemp("whole") / "run", tiny_config(shared_tiny, **settings)
            )

    return made


@pytest.fixture(scope="module")
def whole(cheap: Callable[[dict[str, Any]], Whole]) -> Whole:
    return cheap(SMALL)


@pytest.fixture(scope="module")
def smallest(cheap: Callable[[dict[str, Any]], Whole]) -> Whole:
    return cheap(SMALLEST)


# ------------------------------------------------------------------------------ every single place

PARTS = 2


def files_of(run: Path) -> dict[str, bytes]:
    """What lies there, but for times."""
    files = {str(file.relative_to(run)): file for file in run.rglob("*") if file.is_file()}
    found = {name: file.read_bytes() for name, file in files.items() if name != "config.yaml"}
    times = rb'("(?:rollout_)?seconds": )[-+.e0-9]+'
    return {name: re.sub(times, rb"\1", data) for name, data in found.items()} | {
        name: b"" for name in files if name == "config.yaml"
    }


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("part", range(PARTS))
def test_interrupted_at_every_place(
    part: int, smallest: Whole, tmp_path: Path, outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, places, _, expected = smallest
    assert [places.count(name) for name in ("features", "append_event", "save_state")] == [23, 2, 3]
    part_of = range(*(len(places) * at // PARTS for at in (part, part + 1)))
    run, kept, seen = tmp_path / "run", tmp_path / "kept", list[dict[str, bytes]]()
    kept.mkdir()
    with monkeypatch.context() as patch:
        branches = watching(patch, Branches(run, kept, part_of))
        branches.grow(lambda: drive(run, config))
    assert branches.ends == [0] * len(part_of)
    assert branches.passed == places
    assert outcome(run) == expected
    without_pages(monkeypatch)
    for place in part_of:
        shutil.rmtree(run, ignore_errors=True)
        if (kept / str(place)).exists():
            (kept / str(place)).rename(run)
        # What a run comes to follows from its files: the same files need be resumed only once.
        if (left := files_of(run)) not in seen:
            seen.append(left)
            drive(run, config)
            assert outcome(run) == expected, places[place]
    assert len(seen) > 3
    assert list(tmp_path.rglob(".*")) == []


@pytest.mark.numerics
@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("first", [4, 20, 44, -1])
def test_interrupted_again_and_again(
    first: int, whole: Whole, tmp_path: Path, outcome: Outcome, tripwire: Tripwire,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config, run = whole.config, tmp_path / "run"
    with tripwire.at(first % len(whole.places)):
        drive(run, config)
    without_pages(monkeypatch)
    # The resumed run is stopped soon after it has begun, then a little later.
    for limit in (1, 6):
        with tripwire.at(limit):
            drive(run, config)
    drive(run, config)
    assert outcome(run) == whole.outcome


# ------------------------------------------------------------------------------ every kind of run

KINDS: dict[str, dict[str, Any]] = {
    "whole refresh": {"reward": {"refresh": "2"}, "budget": 140},
    "whole refresh, mlp": {
        "reward": {"refresh": "1"}, "budget": 240,
        "search": {"policy": "mlp", "learn_std": True, "epochs": 2},
    },
    # From the best checkpoint a large step can only lead away: the pool gets worse.
    "gaps acted on": {
        "merge": {"scale": 0.5, "start": "tiny-0000300"}, "search": {"learning_rate": 1.0},
        "reward": {"max_gap": 1e-9}, "budget": 150,
    },
    "subsets, softmax": {
        "reward": {"num_subsets": 2, "num_replacements": 2, "refresh_size": 7}, "budget": 281,
        "merge": {"map": "softmax"},
    },
    "ema": {"merge": {"map": "ema", "scale": 0.3}, "track": "ema"},
    "groups": {"merge": {"scale": 0.2, "groups": {"encoder": r"unet\.enc\."}}},
    "groups, named start, learned std": {
        "merge": {"map": "free", "groups": {"encoder": r"\.enc\."}, "start": "tiny-0000200"},
        "search": {"learn_std": True, "top_fraction": 0.5, "antithetic": False},
    },
}  # fmt: skip


def small_config(make: TinyConfig, folder: Path, changes: dict[str, Any]) -> OptimizeConfig:
    merged = dict(SMALL)
    for key, value in changes.items():
        merged[key] = {**SMALL.get(key, {}), **value} if isinstance(value, dict) else value
    return make(folder, **merged)


def quicken(kind: str, patch: pytest.MonkeyPatch) -> None:
    """No network, unless it is what makes the pool worse."""
    if kind != "gaps acted on":
        without_network(patch)


@pytest.fixture(scope="module")
def whole_of(
    shared_tiny: Path, tiny_config: TinyConfig, run_whole: Make,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Whole]:  # fmt: skip
    folder = tmp_path_factory.mktemp("kinds")

    @functools.cache
    def of_kind(kind: str) -> Whole:
        with pytest.MonkeyPatch.context() as patch:
            quicken(kind, patch)
            return run_whole(folder / kind, small_config(tiny_config, shared_tiny, KINDS[kind]))

    return of_kind


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_resumes(
    kind: str, whole_of: Callable[[str], Whole], tmp_path: Path, outcome: Outcome,
    tripwire: Tripwire, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config, places, _, expected = whole_of(kind)
    quicken(kind, monkeypatch)
    without_pages(monkeypatch)
    events = expected["events.jsonl"]
    assert isinstance(events, list)
    assert len(events) >= 3
    thetas = [event["theta"] for event in events]
    assert thetas[0] != thetas[1] != thetas[2]
    # Between the event of the second round and its resume point, then inside that round again.
    second = [i for i, place in enumerate(places) if place == "save_state"][2]
    run = tmp_path / "run"
    for limit in (second, 2):
        with tripwire.at(limit):
            drive(run, config)
    drive(run, config)
    assert outcome(run) == expected


def test_kinds_are_what_they_say(whole_of: Callable[[str], Whole]) -> None:
    # Without this the test above could pass on runs that are all alike.
    def run(kind: str) -> tuple[mrl.OptimizeResult, list[dict[str, Any]]]:
        result = whole_of(kind).result
        return result, RunDir.open(result.run_dir).events()

    result, _ = run("groups")
    assert result.coefficients.shape == (2, 4)
    assert not torch.equal(result.coefficients[0], result.coefficients[1])
    _, events = run("gaps acted on")
    assert any(event.get("damped") for event in events)
    _, events = run("whole refresh")
    assert [event["refreshed"] for event in events[:4]] == [0, 20, 0, 20]
    result, _ = run("subsets, softmax")
    assert bool((result.coefficients > 0).all())
    result, _ = run("ema")
    assert float(result.coefficients.sum()) == pytest.approx(1)


def test_a_guide_is_found_from_any_folder(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path: Path, outcome: Outcome,
    tripwire: Tripwire, monkeypatch: pytest.MonkeyPatch, no_network: None,
) -> None:  # fmt: skip
    opened = mrl.open_checkpoints(shared_tiny)
    mrl.save_model(tmp_path / "guide", opened.read(0), opened.config)
    monkeypatch.chdir(tmp_path)
    sampler = SamplerConfig(num_steps=2, guidance=1.5, guide="guide")
    config = small_config(tiny_config, shared_tiny, {"sampler": sampler})
    with tripwire.at(None):
        drive(tmp_path / "whole", config)
    with tripwire.at(20):
        drive(tmp_path / "run", config)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    mrl.resume(tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    # Another guide is another run.
    weights = {k: v * 1.01 for k, v in opened.read(0).items()}
    mrl.save_model(tmp_path / "guide", weights, opened.config, replace=True)
    with pytest.raises(RunError, match="inputs have changed since it began: guide"):
        mrl.resume(tmp_path / "run")


# --------------------------------------------------------------------------------- finished runs


def test_a_finished_run_stays_as_it_is(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path: Path, outcome: Outcome, no_network: None
) -> None:
    config = tiny_config(shared_tiny, **SMALL)
    first = mrl.optimize(shared_tiny, out=tmp_path / "run", config=config)
    before = outcome(first.run_dir)
    names = sorted(str(path) for path in tmp_path.rglob("*"))
    again = resume(tmp_path / "run")
    assert torch.equal(again.coefficients, first.coefficients)
    assert again.comparison == first.comparison
    assert again.images == first.images
    assert outcome(tmp_path / "run") == before
    assert sorted(str(path) for path in tmp_path.rglob("*")) == names


def test_resuming_a_finished_run_generates_nothing(
    shared_tiny: Path, tiny_config: TinyConfig, tmp_path: Path, no_network: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = tiny_config(shared_tiny, **SMALL)
    first = mrl.optimize(shared_tiny, out=tmp_path / "run", config=config)

    def refuse(*_: object) -> None:
        raise AssertionError("a finished run generates nothing")

    monkeypatch.setattr(MergedRollout, "features", refuse)
    again = mrl.resume(tmp_path / "run")
    assert isinstance(again, mrl.OptimizeResult)
    assert again.final == first.final


# ------------------------------------------------------------------------------------ what is torn


@pytest.fixture(scope="module")
def stopped_template(whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in its third round."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    second = [i for i, place in enumerate(whole.places) if place == "save_state"][2]
    with pytest.MonkeyPatch.context() as patch:
        without_network(patch)
        with watching(patch, Tripwire()).at(second + 4):
            drive(run, whole.config)
    assert len(RunDir.open(run).events()) == 2
    return run


@pytest.fixture
def stopped(
    stopped_template: Path, shared_tiny: Path, tiny: Path, tmp_path: Path, no_network: None
) -> Path:
    """A run that was stopped in its third round, on a set of the test's own."""
    run = tmp_path / "run"
    shutil.copytree(stopped_template, run)
    settings = (run / "config.yaml").read_text()
    assert str(shared_tiny) in settings
    (run / "config.yaml").write_text(settings.replace(str(shared_tiny), str(tiny)))
    return run


@pytest.mark.parametrize(
    "rest",
    [b'{"kind": "round", "round": 2, "the', b"{", bytes(50), b'{"kind": "round", "round": 2}'],
)
def test_a_torn_line_is_repaired(
    rest: bytes, stopped: Path, whole: Whole, outcome: Outcome
) -> None:
    # The round it belongs to is not in the resume point, so it is done again.
    events = stopped / "events.jsonl"
    events.write_bytes(events.read_bytes() + rest)
    mrl.resume(stopped)
    assert outcome(stopped) == whole.outcome


def test_unfinished_writes_do_not_disturb(stopped: Path, whole: Whole, outcome: Outcome) -> None:
    # What a killed process leaves: temporary files of every kind.
    (stopped / ".tmp-0-state.safetensors").write_bytes(b"half")
    (stopped / ".merged-abc").mkdir()
    mrl.resume(stopped)
    found = outcome(stopped)
    found.pop(".tmp-0-state.safetensors")
    assert found == whole.outcome


# ------------------------------------------------------------------------------ what is refused


def swap_checkpoint(tiny: Path) -> None:
    """Another file under the name of a checkpoint, and a manifest that agrees with it."""
    path, other = (tiny / f"raw/tiny-0000{n}00.safetensors" for n in (2, 1))
    old, new = (hashlib.sha256(file.read_bytes()).hexdigest() for file in (path, other))
    shutil.copy(other, path)
    manifest = tiny / MANIFEST_NAME
    manifest.write_text(manifest.read_text().replace(old, new))


def change_statistics(tiny: Path, name: str) -> None:
    path = tiny / f"evaluation/{name}.safetensors"
    reference = load_reference(path)
    stats = dataclasses.replace(reference.stats, mean=reference.stats.mean + 1)
    save_reference(path, stats, extractor=reference.extractor)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (swap_checkpoint, "checkpoints"),
        (lambda tiny: change_statistics(tiny, "reference"), "reference"),
        (lambda tiny: change_statistics(tiny, "heldout"), "heldout"),
    ],
)
def test_other_inputs_are_refused(
    change: Callable[[Path], None], named: str, stopped: Path, tiny: Path, outcome: Outcome
) -> None:
    change(tiny)
    before = (stopped / "events.jsonl").read_bytes()
    message = rf"run: cannot resume, the inputs have changed since it began: {named} \(by SHA-256"
    with pytest.raises(RunError, match=message):
        mrl.resume(stopped)
    assert (stopped / "events.jsonl").read_bytes() == before


def test_inputs_that_are_gone_are_refused(stopped: Path, tiny: Path) -> None:
    (tiny / "raw/tiny-0000300.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"tiny-0000300\.safetensors: listed in"):
        mrl.resume(stopped)


def cut(data: bytes) -> bytes:
    return data[:-9]


@pytest.mark.parametrize("damage", [cut, lambda _: b"", lambda data: b"x" * len(data)])
def test_a_damaged_resume_point_is_refused(damage: Callable[[bytes], bytes], stopped: Path) -> None:
    path = stopped / "state.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunError, match=r"state\.safetensors: damaged resume point: "):
        mrl.resume(stopped)


@pytest.mark.parametrize(
    "lost", ["result_theta", "pool.features", "pool.cov", "searcher.log_std", "searcher.mean"]
)
def test_a_resume_point_without_a_tensor_is_refused(lost: str, stopped: Path) -> None:
    path = stopped / "state.safetensors"
    header, tensors, _ = read_file(path, hashed=False)
    kept = {name: tensor for name, tensor in tensors.items() if name != lost}
    save_tensors(path, kept, dict(header.metadata))
    with pytest.raises(RunError, match=r"state\.safetensors: damaged resume point: "):
        mrl.resume(stopped)


def test_a_resume_point_of_another_run_is_refused(
    stopped: Path, tiny: Path, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    other = mrl.optimize(tiny, out=tmp_path / "other", config=tiny_config(tiny, seed=6, **SMALL))
    shutil.copy(other.run_dir / "state.safetensors", stopped / "state.safetensors")
    with pytest.raises(MergeRLError, match="belongs to another seed"):
        mrl.resume(stopped)


@pytest.mark.parametrize("name", ["scores.json", "inputs.json"])
def test_damaged_records_are_refused(name: str, stopped: Path) -> None:
    (stopped / name).write_text('{"half": ')
    with pytest.raises(RunError, match=rf"{name}: damaged"):
        mrl.resume(stopped)


def test_what_is_no_run_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nowhere: no such run directory"):
        mrl.resume(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"tiny: expected a run, found set \("):
        mrl.resume(tiny)
