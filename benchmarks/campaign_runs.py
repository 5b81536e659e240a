"""Commands that are killed, stopped, or run out of disk, and what they leave behind.

Each runs in a forked child, in a folder of its own, and is begun again as a user would: `resume`
where there is a run, else the same command. An undisturbed one says what it should come to.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import http.server
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from matplotlib.figure import Figure

import merge_rl as mrl
from benchmarks.campaign_disk import BYTES, FullDisk
from merge_rl.cli.main import main as mergerl
from merge_rl.demo import write_demo
from merge_rl.workflows.report import figures
from tests.children import launch_ranks, run_command
from tests.finetuning import write_sit_set
from tests.quick import without_network
from tests.snapshots import write_snapshot

Cases = Callable[[Path, int, int, int], Iterator[tuple[int, str]]]
"""(folder, seed, cases done, cases in all) -> (number, outcome) of those that are not done."""
TIMED: Final = ("clock.json", "launch.json")
PAGES: Final = ("compare.md", "compare.png", "report.md", "report.html", "report.png")  # with times
READ: Final = (".json", ".jsonl")
MEASURED: Final = ("overhead", "memory_bytes")  # of the machine, beside all that is in seconds
SIZES: Final = (0, 100, 1000, 10_000, 100_000)  # to which files may grow
HANGS: Final = 4.0  # seconds after which a rank that says nothing hangs
SEARCH: Final = {
    "track": "raw", "budget": 110, "sampler": {"num_steps": 2}, "search": {"population": 2},
    "reward": {"pool_size": 40, "subset_size": 10, "refresh_size": 10},
    "evaluation": {"num_images": 10, "repeats": 3, "selection_images": 10},
}  # fmt: skip
FINETUNE: Final = [
    "--steps", "2", "--train-steps", "2", "--subsets", "2", "--pool", "8", "--subset", "2",
    "--eval-steps", "2", "--eval-every", "2", "--eval-images", "4", "--final-images", "4",
    "--repeats", "2", "--set", "curves.ode_solver=euler", "--set", "save_every=1",
]  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command that writes `out` in its folder; how it goes on once there is a run."""

    arguments: Sequence[str]
    going_on: Sequence[str] = ()
    ranks: int = 1
    before: Sequence[str] = ()  # what has to have been run, and for which share of its writes
    share: float = 1.0

    def next(self, place: Path) -> Sequence[str]:
        """What a user does now."""
        run = place / "out"
        begun = any((run / name).is_file() for name in ("config.yaml", "finetune.yaml"))
        if self.going_on and not begun:
            shutil.rmtree(run, ignore_errors=True)  # lost before it was a run
        return self.going_on if self.going_on and begun else self.arguments


def inputs(folder: Path) -> Path:
    """Sets, snapshots and settings that all commands work with, made once."""
    made = folder.parent / "inputs"
    if not made.exists():
        half = made.with_name("inputs-half")
        shutil.rmtree(half, ignore_errors=True)
        write_demo(half)
        write_sit_set(half / "small-sit", half / "sit")
        (half / "search.json").write_text(json.dumps(SEARCH))  # JSON is YAML
        pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1)).astype(np.uint8)
        np.savez(half / "images.npz", images=pixels)
        opened = mrl.open_checkpoints(half / "edm2", track="raw")
        options = {k: v for k, v in (opened.config or {}).items() if k != "model"}
        for index in range(4):
            name = f"snapshots/edm2-tiny-000000{index}-0.050.pkl"
            (half / name).parent.mkdir(exist_ok=True)
            write_snapshot(half / name, opened.read(index), options, encoder="rgb")
        half.rename(made)
    return made


def commands(made: Path) -> dict[str, Command]:
    """By name; `out` is relative to the folder of a case."""
    search = ["optimize", str(made / "edm2"), "--config", str(made / "search.json"), "--out", "out"]
    newest = max((made / "edm2/raw").iterdir())
    tuning = ["finetune", str(made / "small-sit"), "--out", "out", *FINETUNE]
    resume = ["resume", "out"]
    return {
        "optimize": Command(search, resume),
        "finetune": Command(tuning, resume),
        "adapters": Command([*tuning, "--lora-rank", "2"], resume),
        "resume optimize": Command(resume, before=search, share=0.4),
        "resume finetune": Command(resume, before=tuning, share=0.4),
        "report": Command(["report", "out"], before=search),
        "sample": Command(["sample", str(newest), "--num-images", "4", "--out", "out/grid.png"]),
        "convert": Command(["convert", str(made / "snapshots"), "out"]),
        "compare": Command(
            ["compare", str(made / "edm2"), "--config", str(made / "search.json"), "--out", "out",
             "--searcher", "uniform", "--searcher", "policy-gradient", "--seeds", "0"]
        ),
        "evaluate": Command(
            ["evaluate", str(newest), "--num-images", "20", "--repeats", "2",
             "--save-features", "out"]
        ),
        "fetch": Command(["fetch", served(made / "snapshots"), "out", "--yes"]),
        "merge": Command(["merge", str(made / "edm2"), "out", "--track", "raw", "--uniform"]),
        "demo": Command(["demo", "out"]),
        "reference": Command(
            ["reference", str(made / "images.npz"), "--out", "out/real.safetensors",
             "--extractor", "digits", "--extractor-weights",
             str(next(made.rglob("extractor.safetensors")))]
        ),
        "resume": Command(search),
    }  # fmt: skip


@functools.cache
def served(folder: Path) -> str:
    """Address on this machine of a snapshot in the folder."""
    handler = functools.partial(_Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/{min(folder.iterdir()).name}"


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def copyfile(self, source: Any, outputfile: Any) -> None:
        with contextlib.suppress(ConnectionError):  # who asked was killed
            super().copyfile(source, outputfile)


# ---------------------------------------------------------------------------------- children


@dataclass
class Ended:
    """How a command ended."""

    status: int  # as a shell tells it, negative for a signal
    said: str


def start(
    place: Path, arguments: Sequence[str], *, ranks: int = 1, restarts: int = 0,
    prepare: Callable[[], object] = lambda: None, log: str = "said", loaded: Path | None = None,
) -> int:  # fmt: skip
    """The process id of the command, in a group of its own; `loaded` gets names of its modules."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        os.chdir(place)
        said = os.open(place / log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(said, descriptor)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))
        sys.argv = ["mergerl", *arguments]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        prepare()
        status = _run(arguments, ranks, restarts)
        if loaded:
            loaded.write_text("\n".join(sys.modules))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run(arguments: Sequence[str], ranks: int, restarts: int) -> int:
    try:
        if ranks > 1:
            launch_ranks(ranks, restarts, run_command, *arguments)
            return 0
        mergerl()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except Exception as error:  # noqa: BLE001 (a launcher whose ranks failed)
        print(f"launcher: {type(error).__name__}", file=sys.stderr)
    return 1


def end(pid: int, place: Path, log: str = "said") -> Ended:
    """Wait for it."""
    _, status = os.waitpid(pid, 0)
    said = (place / log).read_text(errors="replace")
    return Ended(os.waitstatus_to_exitcode(status), said)


def run(place: Path, arguments: Sequence[str], **options: Any) -> Ended:
    """Start it and wait for its end."""
    return end(start(place, arguments, **options), place)


def outcome(place: Path) -> dict[str, object]:
    """What lies in `out`, by name, without times."""
    found: dict[str, object] = {}
    for file in sorted((place / "out").rglob("*")):
        name = str(file.relative_to(place / "out"))
        if file.is_file() and file.name in PAGES:
            found[name] = "a page"
        elif file.is_file() and file.name not in TIMED:
            found[name] = _timeless(file) if file.suffix in READ else file.read_bytes()
    return found


def _timeless(file: Path) -> object:
    lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
    return [_without_times(json.loads(line)) for line in lines]


def _without_times(value: object) -> object:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if "second" not in k and k not in MEASURED}
        return {k: _without_times(v) for k, v in kept.items()}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


@dataclass
class Bench:
    """A command, what it comes to when nothing happens, and how long that takes."""

    folder: Path
    command: Command
    expected: dict[str, object] = field(default_factory=dict)
    seconds: float = 0.0
    begun: Path | None = None

    def __post_init__(self) -> None:
        if self.command.before:
            self.begun = self._run_before()
        whole = self.fresh("whole")
        self._undisturbed(whole, loaded=whole / "modules")
        for name in (whole / "modules").read_text().split():
            with contextlib.suppress(ImportError):  # what is no file, but was put there
                importlib.import_module(name)  # once, for all children that come
        self.expected, again = outcome(whole), self.fresh("whole")
        began = time.monotonic()
        self._undisturbed(again)
        self.seconds = time.monotonic() - began
        if outcome(again) != self.expected:
            raise SystemExit(f"undisturbed: {self.command.arguments} does not come to the same")

    def _undisturbed(self, place: Path, **options: Any) -> None:
        ended = run(place, self.command.arguments, ranks=self.command.ranks, **options)
        if ended.status != 0:
            raise SystemExit(f"undisturbed: {ended.said}")

    def fresh(self, name: str) -> Path:
        """A new folder of a case."""
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        if self.begun:
            shutil.copytree(self.begun, place / "out")
        return place

    def _run_before(self) -> Path:
        """What the command goes on with: what came before, stopped by a full disk on its way."""
        counted, place = self.fresh("before-whole"), self.fresh("before")
        sites = counted / "sites"
        run(counted, self.command.before, prepare=lambda: FullDisk(None, sites).install())
        first = int(self.command.share * len(sites.read_text().splitlines()))
        run(place, self.command.before, prepare=FullDisk(first).install)
        return place / "out"

    def judged(self, place: Path, *, ended_well: bool = False) -> str:
        """What the case came to, once it is gone on with where it has not ended well."""
        if not ended_well:
            ended = run(place, self.command.next(place), ranks=self.command.ranks)
            if ended.status != 0:
                return f"cannot go on: {_last(ended)}"
        found = outcome(place)
        names = sorted({*found, *self.expected})
        differ = [name for name in names if found.get(name) != self.expected.get(name)]
        differ += sorted(f.name for f in place.iterdir() if f.name.startswith("."))
        if not differ:
            shutil.rmtree(place)
        return f"differs: {', '.join(differ)}" if differ else "equal"


def _last(ended: Ended) -> str:
    lines = [line for line in ended.said.splitlines() if line.strip()]
    return lines[-1] if lines else f"status {ended.status}"


# -------------------------------------------------------------------------------------- kills


def kills(name: str, ranks: int = 1) -> Cases:
    """Kill one of its processes once or twice, then go on."""

    def cases(folder: Path, seed: int, done: int, total: int) -> Iterator[tuple[int, str]]:
        command = commands(inputs(folder))[name]
        bench = Bench(folder, Command(command.arguments, command.going_on, ranks))
        for number in range(done, total):
            draw = random.Random(f"{seed} kill {name} {ranks} {number}")
            place, killed = bench.fresh(f"case-{number}"), 0
            for _ in range(draw.choice((1, 1, 2))):
                killed += _kill(bench, place, draw)
            found = bench.judged(place)
            yield number, found if killed or found != "equal" else "too late"

    return cases


def _kill(bench: Bench, place: Path, draw: random.Random) -> bool:
    """Whether it was still running; of several ranks one is lost, and the launcher begins again."""
    ranks = bench.command.ranks
    pid = start(place, bench.command.next(place), ranks=ranks, restarts=3)
    time.sleep(draw.uniform(0.02, 1.0) * bench.seconds)
    alive = os.waitpid(pid, os.WNOHANG) == (0, 0)
    if alive and ranks == 1:
        os.killpg(pid, signal.SIGKILL)
    elif alive:
        for victim in children(pid)[:: draw.choice((1, -1))][:1]:
            os.kill(victim, signal.SIGKILL)
    if alive:
        os.waitpid(pid, 0)
    return alive


def children(pid: int) -> list[int]:
    """Process ids of its ranks, in the order in which they began."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == pid and b"resource_tracker" not in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return sorted(found)


def killed_pairs(name: str) -> Cases:
    """Two at one folder at once, of which one is killed; then go on."""

    def cases(folder: Path, seed: int, done: int, total: int) -> Iterator[tuple[int, str]]:
        bench = Bench(folder, commands(inputs(folder))[name])
        for number in range(done, total):
            draw = random.Random(f"{seed} pair {name} {number}")
            place = bench.fresh(f"case-{number}")
            arguments = bench.command.next(place)
            pids = [start(place, arguments, log=f"said-{index}") for index in range(2)]
            time.sleep(draw.uniform(0.02, 1.0) * bench.seconds)
            victim = draw.choice(pids)
            alive = os.waitpid(victim, os.WNOHANG) == (0, 0)
            if alive:
                os.killpg(victim, signal.SIGKILL)
                os.waitpid(victim, 0)
            other = next(pid for pid in pids if pid != victim)
            ended = end(other, place, f"said-{pids.index(other)}")
            odd = ended.status != 0 and not _is_refusal(ended)
            found = f"told: {_last(ended)}" if odd else bench.judged(place)
            yield number, found if alive or found != "equal" else "too late"

    return cases


# -------------------------------------------------------------------------------------- disks


def disks(name: str) -> Cases:
    """For every write: the disk is full from there on."""

    def prepared(sites: list[tuple[int, str]]) -> dict[str, Callable[[], object]]:
        return {f"case-{first}": FullDisk(first).install for first, _ in sites}

    return _without_room(name, prepared)


def limits(name: str) -> Cases:
    """For some sizes, and for every write of bytes: files may grow to that size, or to the middle
    of the write, and no further (RLIMIT_FSIZE).
    """

    def prepared(sites: list[tuple[int, str]]) -> dict[str, Callable[[], object]]:
        cut = [first for first, site in sites if site.startswith(BYTES)]
        return {
            **{f"size-{size}": functools.partial(_bounded, size) for size in SIZES},
            **{f"case-{first}": FullDisk(first, cut=True).install for first in cut},
        }

    return _without_room(name, prepared)


def _without_room(
    name: str, prepared: Callable[[list[tuple[int, str]]], dict[str, Callable[[], object]]]
) -> Cases:
    def cases(folder: Path, seed: int, done: int, total: int) -> Iterator[tuple[int, str]]:
        with _quick():
            bench = Bench(folder, commands(inputs(folder))[name])
            ways = list(prepared(_sites(bench, f"{seed} disk {name}")).items())
        for index, (case, prepare) in enumerate(ways[:total][done:], done):
            with _quick():  # another command's turn comes between two cases
                found = _refused(bench, case, prepare)
            yield index, found

    return cases


@contextlib.contextmanager
def _quick() -> Iterator[None]:
    """Networks, figures and the disk itself, on which no write depends, cost next to nothing."""
    # Known to all children: the disk of the output is full, not the one that libraries try.
    tempfile.gettempdir()
    with pytest.MonkeyPatch.context() as patch:
        without_network(patch)  # but for gradients
        patch.setattr(Figure, "savefig", functools.partialmethod(_blank, Figure.savefig))
        patch.setattr(figures, "can_draw", lambda: sys._getframe(1).f_code.co_name != "chart")
        patch.setattr(os, "fsync", lambda _descriptor: None)  # processes end here, no machine
        yield


def _sites(bench: Bench, seed: str) -> list[tuple[int, str]]:
    """Number and site of all writes: first one of each site, drawn, then a second of each."""
    place = bench.fresh("count")
    run(place, bench.command.arguments, prepare=lambda: FullDisk(None, place / "sites").install())
    writes = list(enumerate((place / "sites").read_text().splitlines()))
    random.Random(seed).shuffle(writes)
    seen: Counter[str] = Counter()
    turns = []
    for write in writes:
        turns.append(seen[write[1]])
        seen[write[1]] += 1
    return [write for _, write in sorted(zip(turns, writes, strict=True), key=itemgetter(0))]


def _refused(bench: Bench, case: str, prepare: Callable[[], object]) -> str:
    """What a command came to whose writes are refused; it speaks into a pipe, which has room."""
    place = bench.fresh(case)
    receiving, sending = os.pipe()
    fcntl.fcntl(sending, fcntl.F_SETPIPE_SZ, 2**20)  # nobody listens before the end

    def begin() -> None:
        for descriptor in (1, 2):
            os.dup2(sending, descriptor)
        prepare()

    status = run(place, bench.command.arguments, prepare=begin).status
    os.close(sending)
    with os.fdopen(receiving, errors="replace") as file:
        ended = Ended(status, file.read())
    (place / "said").write_text(ended.said)
    if status == 0 and "no page: " in ended.said:
        run(place, ["report", "out"])  # as it is told to
    return _complaint(ended, place) or bench.judged(place, ended_well=status == 0)


def _blank(_figure: Figure, save: Callable[..., object], *arguments: Any, **options: Any) -> None:
    save(Figure(figsize=(1, 1)), *arguments, **options)


def _bounded(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _complaint(ended: Ended, place: Path) -> str | None:
    """What is wrong with how a command met a full disk; None if nothing is."""
    left = [f.name for f in place.rglob("*") if f.name.startswith(".tmp-") or f.suffix == ".lock"
            or f.name == ".lock"]  # fmt: skip
    if left:
        return f"left behind: {', '.join(left)}"
    errors = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    if ended.status == 0:  # what is written for no result, such as a lock's note
        return None if not errors else f"exit 0, yet {errors[0]}"
    words = [os.strerror(errno.ENOSPC), os.strerror(errno.EFBIG)]
    named = any(name in line for line in errors for name in (" out", str(place)))
    if len(errors) != 1 or not any(word in errors[0] for word in words) or not named:
        return f"told: {_last(ended)}"
    return "told a temporary" if ".tmp-" in errors[0] else None


# ------------------------------------------------------------------------- ranks and writers


def slowed(name: str) -> Cases:
    """A rank is stopped for a while, and goes on: the others wait for it."""

    def cases(folder: Path, seed: int, done: int, total: int) -> Iterator[tuple[int, str]]:
        command = commands(inputs(folder))[name]
        bench = Bench(folder, Command(command.arguments, command.going_on, 2))
        for number in range(done, total):
            draw = random.Random(f"{seed} slow {name} {number}")
            place = bench.fresh(f"case-{number}")
            pid = start(place, command.arguments, ranks=2)
            time.sleep(draw.uniform(0.1, 0.9) * bench.seconds)
            for victim in children(pid)[:: draw.choice((1, -1))][:1]:
                os.kill(victim, signal.SIGSTOP)
                time.sleep(draw.uniform(0.5, 2.0))
                os.kill(victim, signal.SIGCONT)
            ended = end(pid, place)
            same = outcome(place) == bench.expected
            yield number, "equal" if ended.status == 0 and same else f"told: {_last(ended)}"

    return cases


def hung(name: str) -> Cases:
    """A rank is stopped for good: the other says which one, and ends; then go on."""

    def cases(folder: Path, seed: int, done: int, total: int) -> Iterator[tuple[int, str]]:
        command = commands(inputs(folder))[name]
        bench = Bench(folder, Command(command.arguments, command.going_on, 2))
        limit = {"MERGERL_TIMEOUT": str(HANGS)}
        for number in range(done, total):
            draw = random.Random(f"{seed} hang {name} {number}")
            place, rank = bench.fresh(f"case-{number}"), draw.randrange(2)
            wait = functools.partial(os.environ.update, limit)
            pid = start(place, command.arguments, ranks=2, prepare=wait)
            time.sleep(draw.uniform(0.2, 0.8) * bench.seconds)
            ranks = children(pid)
            _send(ranks[rank : rank + 1], signal.SIGSTOP)
            until = time.monotonic() + 5 * HANGS
            late = not ranks or (place / "out/result.json").exists()  # none waits for another
            while len(children(pid)) == len(ranks) and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(1)  # for the sentence of the other, should it be the launcher who ends it
            _send(ranks[rank : rank + 1], signal.SIGKILL)  # as the launcher does in the end
            ended = end(pid, place)
            told = [line for line in ended.said.splitlines() if line.startswith("error: ")]
            named = len(told) == 1 and f"rank {rank}" in told[0]
            found = bench.judged(place) if named else f"told: {told or _last(ended)}"
            late = late or ended.status == 0
            yield number, "too late" if late else "named" if found == "equal" else found

    return cases


def _send(pids: Sequence[int], wanted: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, wanted)


def writers(name: str) -> Cases:
    """Two at one folder at once: whoever is refused comes again; nothing is lost."""

    def cases(folder: Path, seed: int, done: int, total: int) -> Iterator[tuple[int, str]]:
        made = inputs(folder)
        bench = Bench(folder, commands(made)[name])
        for number in range(done, min(total, 20)):
            draw = random.Random(f"{seed} two {name} {number}")
            place = bench.fresh(f"case-{number}")
            if name == "resume":
                _begin(bench, place)
            waiting = _pair(name, made, bench)
            while waiting:
                pids = []
                for index, arguments in enumerate(waiting):
                    pids.append(start(place, arguments, log=f"said-{index}"))
                    time.sleep(draw.uniform(0, 0.1))
                ended = [end(pid, place, f"said-{i}") for i, pid in enumerate(pids)]
                odd = [e for e in ended if e.status and not _is_refusal(e)]
                if odd:
                    yield number, f"told: {_last(odd[0])}"
                    break
                waiting = [a for a, e in zip(waiting, ended, strict=True)
                           if e.status and name == "convert"]  # fmt: skip
            else:
                same = outcome(place).keys() == bench.expected.keys() and (
                    name == "convert" or outcome(place) == bench.expected
                )
                yield number, "nothing lost" if same else "lost"

    return cases


def _pair(name: str, made: Path, bench: Bench) -> list[Sequence[str]]:
    if name != "convert":
        return [["resume", "out"] if name == "resume" else bench.command.arguments] * 2
    files = sorted((made / "snapshots").iterdir())
    return [["convert", *map(str, files[:2]), "out"], ["convert", *map(str, files[2:]), "out"]]


def _begin(bench: Bench, place: Path) -> None:
    """A run that is killed once a round of it is there."""
    pid = start(place, bench.command.arguments)
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if (place / "out/events.jsonl").exists():
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return
        time.sleep(0.01)


def _is_refusal(ended: Ended) -> bool:
    return "is being written by" in ended.said or "exists already" in ended.said


_KILLED: Final = ("optimize", "finetune", "convert", "fetch", "compare", "evaluate")
_ONE_PROCESS: Final = ("convert", "fetch", "compare")  # refuse to be one of several ranks
_WRITE: Final = (
    *_KILLED, "merge", "demo", "reference", "sample", "report", "resume optimize",
    "resume finetune", "adapters",
)  # fmt: skip
PARTS: Final[Mapping[str, Mapping[str, Cases]]] = {
    "kills": {
        **{n: kills(n) for n in _KILLED},
        **{f"{n}, 2 ranks": kills(n, 2) for n in _KILLED if n not in _ONE_PROCESS},
        **{f"{n}, 2 at once": killed_pairs(n) for n in _ONE_PROCESS},
    },
    "disks": {n: disks(n) for n in _WRITE},
    "limits": {n: limits(n) for n in _WRITE},
    "ranks": {
        **{f"{n}, slowed": slowed(n) for n in ("optimize", "finetune", "evaluate")},
        **{f"{n}, hung": hung(n) for n in ("optimize", "finetune", "evaluate")},
    },
    "writers": {
        n: writers(n) for n in ("convert", "optimize", "resume", "fetch", "reference", "evaluate")
    },
}
