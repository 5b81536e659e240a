"""Two commands at one folder: nothing is lost, and the second is told who holds it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import merge_rl as mrl
from merge_rl.config.optimize import OptimizeConfig
from merge_rl.storage.files import locked, locked_output, write_png
from merge_rl.storage.runs import FinetuneRun, RunDir
from tests.children import Child
from tests.finetuning import small_config, write_sit_set
from tests.fixtures import TINY_MODEL
from tests.hub_server import FileServer
from tests.snapshots import write_snapshot

Command = Callable[..., Any]
Fork = Callable[..., Child]
KWARGS = {key: value for key, value in TINY_MODEL.items() if key != "model"}
SEARCH: list[object] = [
    "--track", "raw", "--budget", 110, "--final-images", 10, "--repeats", 3,
    "--set", "reward.pool_size=20",
    "--set", "reward.subset_size=10", "--set", "reward.refresh_size=10",
    "--set", "search.population=2", "--set", "evaluation.selection_images=10",
]  # fmt: skip


@contextmanager
def held(lock: Callable[[Path], Any], place: Path) -> Iterator[None]:
    """Somebody else writes there meanwhile."""
    ready, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock(place):
            ready.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert ready.wait(60)
    try:
        yield
    finally:
        done.set()
        thread.join()


def contents(folder: Path) -> dict[str, bytes]:
    """By name; what is written of a lock comes and goes."""
    files = [f for f in folder.rglob("*") if f.is_file() and not f.name.endswith(".lock")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture
def snapshots(shared_tiny: Path, tmp_path: Path) -> list[Path]:
    opened = mrl.open_checkpoints(shared_tiny, track="raw")
    files = [tmp_path / f"{name}.pkl" for name in opened.names]
    for index, file in enumerate(files):
        write_snapshot(file, opened.read(index), KWARGS, encoder="rgb")
    return files


def begun(tiny: Path, out: Path) -> Path:
    """A search that was stopped when it had its settings."""
    config = OptimizeConfig(checkpoints=str(tiny), track="raw")
    return RunDir.create(out, config, {"hashes": {}, "version": "0"}).path


@pytest.mark.parametrize(
    "command", ["convert", "evaluate", "optimize", "resume", "compare", "finetune", "--resume"]
)
def test_the_second_writer_of_a_folder_is_refused(
    command: str, tiny: Path, snapshots: list[Path], mergerl: Command, tmp_path: Path
) -> None:
    out, model = tmp_path / "out", tiny / "raw/tiny-0000400.safetensors"
    if command == "resume":
        begun(tiny, out)
    elif "-" in command or command == "finetune":
        sit = write_sit_set(tmp_path / "sit", tiny)
        if "-" in command:
            inputs = {"hashes": {}, "version": "0"}
            FinetuneRun.create(out, small_config(sit / "raw/sit-1.safetensors"), inputs)
    arguments: dict[str, list[object]] = {
        "convert": ["convert", snapshots[0], out],
        "evaluate": ["evaluate", model, "--num-images", 4, "--save-features", out],
        "optimize": ["optimize", tiny, "--out", out, *SEARCH],
        "resume": ["resume", out],
        "compare": ["compare", tiny, "--out", out, "--searcher", "uniform", *SEARCH],
        "finetune": ["finetune", tmp_path / "sit/raw/sit-1.safetensors", "--out", out],
        "--resume": ["resume", out],
    }
    with held(locked, out):
        before = contents(out)
        ended = mergerl(*arguments[command])
        assert ended.code == 1
        assert f"error: {out} is being written by " in ended.err.replace("\n", "")
        assert "; wait for it, or end it" in ended.err
        assert contents(out) == before


def test_the_second_writer_of_a_file_or_model_is_refused(
    tiny: Path, mergerl: Command, generator: torch.Generator, tmp_path: Path
) -> None:
    pixels = torch.randint(0, 256, (4, 1, 8, 8), generator=generator).to(torch.uint8)
    for index, image in enumerate(pixels):
        write_png(tmp_path / f"images/{index}.png", image)
    extractor = ["--extractor-weights", tiny / "evaluation/extractor.safetensors"]
    reference = ["reference", tmp_path / "images", "--extractor", "digits", *extractor]
    cases = {"merged": ["merge", tiny, tmp_path / "merged", "--track", "raw", "--uniform"],
             "real.safetensors": [*reference, "--out", tmp_path / "real.safetensors"]}  # fmt: skip
    for name, command in cases.items():
        with held(locked_output, tmp_path / name):
            ended = mergerl(*command)
            assert ended.code == 1
            assert f"error: {tmp_path / name} is being written by " in ended.err
            assert not (tmp_path / name).exists()
        assert mergerl(*command).code == 0
    with held(locked, tmp_path / "merged"):
        ended = mergerl("push", tmp_path / "merged", "me/mine", "--dry-run")
        assert ended.code == 1
        assert "merged is being written by " in ended.err


def test_the_second_fetch_is_refused(
    web: FileServer, golden: Path, mergerl: Command, tmp_path: Path
) -> None:
    data = (golden / "edm2" / "snapshot" / "tiny_snapshot.pkl").read_bytes()
    address = web.put("/edm2-tiny-0002048-0.050.pkl", data)
    with held(locked, tmp_path / "out"):
        ended = mergerl("fetch", address, "out", "--yes")
        assert ended.code == 1
        assert "error: out is being written by " in ended.err
    assert mergerl("fetch", address, "out", "--yes").code == 0


def test_a_refused_conversion_leaves_nothing(mergerl: Command, tmp_path: Path) -> None:
    (tmp_path / "broken.pkl").write_bytes(b"\x80\x04.")
    ended = mergerl("convert", tmp_path / "broken.pkl", tmp_path / "new" / "set")
    assert ended.code == 1
    assert not (tmp_path / "new").exists()


def test_two_conversions_at_once_lose_nothing(
    snapshots: list[Path], fork: Fork, tmp_path: Path
) -> None:
    out = tmp_path / "ckpts"
    waiting = set(files := snapshots[:2])
    while waiting:  # whoever is refused comes again
        started = {file: fork("convert", file, out) for file in waiting}
        for file, child in started.items():
            _, err = child.communicate(60)
            if child.returncode == 0:
                waiting.remove(file)
            else:
                # Who it is, is written a moment later, and gone a moment before: see the locks.
                assert "is being written by " in err
    assert sorted(mrl.open_checkpoints(out).names) == sorted(file.stem for file in files)


def test_two_resumes_at_once_do_the_work_once(
    tiny: Path, mergerl: Command, fork: Fork, outcome: Callable[[Path], object], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert mergerl("optimize", tiny, "--out", whole, *SEARCH).code == 0
    with monkeypatch.context() as patch:
        append, passed = RunDir.append_event, list[object]()

        def stop(self: RunDir, event: Any) -> None:
            append(self, event)
            passed.append(event)
            if len(passed) == 2:
                raise KeyboardInterrupt

        patch.setattr(RunDir, "append_event", stop)
        assert mergerl("optimize", tiny, "--out", run, *SEARCH).code == 1
    children = [fork("resume", run) for _ in range(3)]
    said = [child.communicate(120)[1] for child in children]
    codes = [child.returncode for child in children]
    assert 0 in codes
    for code, text in zip(codes, said, strict=True):
        # Who comes when it is over finds it finished; nothing is done twice.
        assert code == 0 or "is being written by " in text
    assert outcome(run) == outcome(whole)
