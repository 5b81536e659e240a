"""One writer a folder: who comes second is told who holds it, and dead writers leave nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from merge_rl.errors import RunError
from merge_rl.storage.files import (
    atomic_path,
    locked,
    locked_output,
    locks,
    new_folder,
    require_new,
    require_unlocked,
    temporary_beside,
    write_text,
)
from tests.children import Child

ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}
HOLDER = r"is being written by .+ \(pid \d+ on .+, since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC\)"


def hold(folder: Path, ready: Path) -> None:
    """Holds a folder, with half a file in it, until it is killed."""
    with locked(folder), atomic_path(folder / "inner" / "a.bin") as half:
        half.write_text("half")
        ready.write_text("")
        time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Child]:
    """A process that holds `tmp_path`/it."""
    ready = tmp_path / "ready"
    child = Child(hold, tmp_path / "it", ready, folder=tmp_path / "child", environment=ALONE)
    while not ready.exists():
        assert child.poll() is None
        time.sleep(0.01)
    yield child
    child.kill()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_second_is_told_who_holds_it(holder: Child, tmp_path: Path) -> None:
    folder = tmp_path / "it"
    for _ in range(2):  # being refused changes nothing
        with pytest.raises(RunError, match=HOLDER) as refused, locked(folder):
            raise AssertionError
    assert f"(pid {holder.pid} on {socket.gethostname()}, since" in str(refused.value)
    with pytest.raises(RunError, match=HOLDER):
        require_unlocked(folder)
    holder.kill()
    holder.communicate(10)
    # Killed, it leaves its lock and half a file: both are taken over.
    (half,) = (folder / "inner").iterdir()
    assert half.name.startswith(".tmp-")
    require_unlocked(folder)
    with locked(folder):
        assert not half.exists()
        assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()
    assert names_in(folder) == ["inner"]


def test_one_of_a_folder_and_of_what_is_beside_it(tmp_path: Path) -> None:
    refused: list[str] = []

    def try_both() -> None:
        for lock, place in ((locked, folder), (locked_output, tmp_path / "out")):
            try:
                with lock(place):
                    pass
            except RunError as error:
                refused.append(str(error))

    folder = tmp_path / "a" / "b"
    with locked(folder), locked(folder), locked_output(tmp_path / "out"):
        # Nested blocks of a thread are one writer; threads are several.
        thread = threading.Thread(target=try_both)
        thread.start()
        thread.join()
        assert names_in(tmp_path) == [".out.lock", "a"]
    assert len(refused) == 2
    assert refused[1].startswith(f"{tmp_path / 'out'} is being written by ")
    assert names_in(tmp_path) == []  # made to be locked, and nothing came


def test_what_is_made_to_be_locked_is_no_content(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with locked(folder):
        require_new(folder)
        write_text(folder / "a", "x")
        with pytest.raises(RunError, match="exists already"):
            require_new(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RunError, match="exists already"):
        require_new(empty)  # somebody made it for something


def test_temporaries_of_living_processes_stay(tmp_path: Path) -> None:
    ours = temporary_beside(tmp_path / "a.npz")
    dead = [ours.with_name(ours.name.replace(f"-{os.getpid()}-", "-4194305-")), tmp_path / ".tmp-1"]
    other = ours.with_name(ours.name.replace(locks.machine(), "0" * 8))
    for path in (ours, other):
        path.write_text("half")
    dead[0].mkdir()
    (dead[0] / "model.safetensors").write_text("half")
    dead[1].write_text("half")
    long_ago = time.time() - locks.ABANDONED_SECONDS - 1
    os.utime(dead[1], (long_ago, long_ago))
    with locked(tmp_path):
        assert names_in(tmp_path) == sorted([".lock", ours.name, other.name])
    os.utime(other, (long_ago, long_ago))
    with locked(tmp_path):
        assert names_in(tmp_path) == [".lock", ours.name]
    assert len(names_in(tmp_path)) == 1


def test_a_new_folder_sweeps_its_own_kind_beside_it(tmp_path: Path) -> None:
    def dead(name: str) -> Path:
        path = temporary_beside(tmp_path / name)
        return path.with_name(path.name.replace(f"-{os.getpid()}-", "-4194305-"))

    dead("model").mkdir()
    dead("other").mkdir()
    with new_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("x")
    left = [name for name in names_in(tmp_path) if name != "model"]
    assert len(left) == 1
    assert left[0].endswith("-other")


# ------------------------------------------------------------------------------- without locks


@pytest.fixture
def _no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_descriptor: int, _how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("_no_locks")
def test_where_a_file_system_knows_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / ".lock"

    def refusal() -> str:
        with pytest.raises(RunError) as refused, locked(tmp_path):
            raise AssertionError
        return str(refused.value)

    with locked(tmp_path):
        note = json.loads(lock.read_text())
    assert not lock.exists()
    lock.write_text(json.dumps(note))  # of a process that lives: this one
    assert f"(pid {os.getpid()} on " in refusal()
    lock.write_text(json.dumps({**note, "pid": 4194305}))
    with locked(tmp_path):  # of this machine and gone
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    away = {**note, "pid": 4194305, "host": "node7", "machine": "0" * 8}
    lock.write_text(json.dumps(away))
    assert refusal().endswith(
        f"on node7, since {note['since']}); wait for it, or remove {lock} if it is gone"
    )
    lock.write_text("")
    assert "is being written by another process; wait for it, or remove" in refusal()


# -------------------------------------------------------------------------------- what is there


def test_a_lock_that_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / ".lock").symlink_to(victim)
    with pytest.raises(RunError, match="set: cannot be written: Too many levels"), locked(folder):
        raise AssertionError
    assert victim.read_text() == "mine"
    (folder / ".lock").unlink()
    os.mkfifo(folder / ".lock")
    with pytest.raises(RunError, match="found no file; remove it"), locked(folder):
        raise AssertionError


def test_folders_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(RunError, match="file: expected a folder to write to, found a file"),
        locked(tmp_path / "file"),
    ):
        raise AssertionError
    with (
        pytest.raises(RunError, match=r"inner: cannot be written: Not a directory"),
        locked(tmp_path / "file" / "inner"),
    ):
        raise AssertionError


def test_a_folder_that_its_file_system_does_not_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_entry(*_: object, **_options: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(Path, "mkdir", no_entry)  # as below /proc
    message = "new: cannot be made or written: No such file or directory"
    with pytest.raises(RunError, match=message), locked(tmp_path / "new"):
        raise AssertionError


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/usr/bin/mergerl", "fetch", "https://host/?token=secret"], "mergerl fetch"),
        (["/x/merge_rl/__main__.py", "--debug", "resume"], "mergerl"),
        (["train.py", "secret"], "train.py"),
        ([""], "python"),
    ],
)
def test_only_the_command_is_told(argv: list[str], command: str) -> None:
    assert locks._command(argv) == command


def take_turns(folder: Path, rounds: int) -> None:
    """Raises a number by one under the lock, again and again."""
    done = 0
    while done < rounds:
        try:
            with locked(folder):
                number = folder / "number"
                found = int(number.read_text()) if number.exists() else 0
                number.write_text(str(found + 1))
                done += 1
        except RunError:
            time.sleep(0.0005)


def test_no_turn_is_lost(tmp_path: Path) -> None:
    folder, rounds = tmp_path / "it", 100
    children = [
        Child(take_turns, folder, rounds, folder=tmp_path / f"child{i}", environment=ALONE)
        for i in range(3)
    ]
    for child in children:
        child.communicate(60)
        assert child.returncode == 0
    assert (folder / "number").read_text() == str(3 * rounds)
    assert names_in(folder) == ["number"]
