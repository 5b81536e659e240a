"""The campaign in short: damaged files, full disks and killed commands, a few of each."""

from __future__ import annotations

import os
import pickle
import random
import signal
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import pytest

from benchmarks import campaign_files, campaign_runs
from benchmarks.campaign_disk import BYTES, FullDisk
from benchmarks.campaign_files import READERS, is_sound, mutate, run_cases


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("campaign") / "corpus"
    folder.mkdir()
    campaign_files.make_corpus(folder)
    return folder


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(name: str, corpus: Path) -> None:
    found = dict(run_cases(name, 1, range(25), corpus))
    assert list(found) == list(range(25))
    assert {number: told for number, told in found.items() if not is_sound(told)} == {}


def test_what_a_reader_does_wrong_is_seen(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A reader of each kind that must not be: the campaign has to tell them from sound ones.
    def spend(_path: Path) -> None:
        while True:
            pass

    wrong = {
        "executed: os.system": lambda _path: os.system("true"),
        "executed: pickle.find_class": lambda _path: pickle.loads(pickle.dumps(Path("x"))),
        "ZeroDivisionError": lambda _path: 1 // 0,
        "crash: signal 9": lambda _path: os.kill(os.getpid(), signal.SIGSEGV),
        "memory": lambda _path: bytearray(2**40),
        "hang": spend,
    }
    monkeypatch.setattr(campaign_files, "SECONDS", 1)
    for told, read in wrong.items():
        reader = campaign_files.Reader(("settings.yaml",), read)
        monkeypatch.setitem(campaign_files.READERS, "wrong", reader)
        (outcome,) = (found for _, found in run_cases("wrong", 0, range(1), corpus))
        assert outcome.startswith(told.split(": signal")[0]), outcome


def test_cases_follow_from_the_seed() -> None:
    def case(seed: int) -> bytes:
        return mutate(bytes(range(256)) * 8, b"other", random.Random(seed))

    assert case(3) == case(3)
    assert len({case(seed) for seed in range(50)}) > 45


def test_a_full_disk_refuses_from_its_write_on(tmp_path: Path) -> None:
    disk = FullDisk(3)
    with disk.open(tmp_path / "a", "w") as file:  # the first: its name
        file.write("x")
        file.flush()  # the second
        file.write("y")
        file.flush()  # the third
    assert (tmp_path / "a").read_text() == "xy"
    with pytest.raises(OSError, match="No space left"):
        disk.open(tmp_path / "b", "wb")


def test_a_limit_lies_in_the_middle_of_its_write(tmp_path: Path) -> None:
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid == 0:
        disk = FullDisk(3, tmp_path / "sites", cut=True)
        with suppress(OSError), disk.open(tmp_path / "a", "wb", buffering=0) as file:
            file.write(b"x" * 7)  # the second, after its name
            disk.use(tmp_path)  # the third, a name
            os.write(sending, b"%d" % file.write(b"y" * 10))  # the fourth
            file.write(b"z")
            os.write(sending, b" and more")
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(receiving, 100) == b"5"  # half of it; of the fifth nothing
    assert (tmp_path / "a").read_bytes() == b"x" * 7 + b"y" * 5
    kinds = [line.split(" ")[0] for line in (tmp_path / "sites").read_text().splitlines()]
    assert kinds == ["name", BYTES, "name", BYTES]  # the note of the next had no room either


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all disturbed commands, which share their inputs."""
    return tmp_path_factory.mktemp("disturbed")


def outcomes(part: str, name: str, folder: Path, numbers: slice) -> Iterator[str]:
    runs = folder / f"{part}-{name}"
    cases = campaign_runs.PARTS[part][name](runs, 2, numbers.start, numbers.stop)
    for _, told in islice(cases, numbers.stop - numbers.start):
        yield told


@pytest.mark.parametrize(
    ("part", "name", "numbers"),
    [
        ("kills", "convert, 2 at once", slice(0, 1)),
        ("kills", "optimize", slice(0, 1)),
        ("disks", "merge", slice(1, 3)),
        ("disks", "demo", slice(60, 62)),
        ("limits", "merge", slice(5, 8)),
        ("writers", "convert", slice(0, 1)),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_disturbed_commands_come_to_the_same(
    part: str, name: str, numbers: slice, disturbed: Path
) -> None:
    found = list(outcomes(part, name, disturbed, numbers))
    assert len(found) == numbers.stop - numbers.start
    assert [told for told in found if not is_sound(told)] == []
