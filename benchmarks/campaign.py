"""What can be done to the files and processes of this project, and what it came to.

    python -m benchmarks.campaign [--parts files,kills,disks,limits,ranks,writers] [--cases 100000]
                                  [--kills 100] [--only NAME ...] [--seed 0] [--workers 1]
                                  [--seconds T] [--folder build/campaign] [--out FILE.json]

files   damaged and hostile files for every reader: nothing runs, hangs, dies or is half written
kills   commands killed (SIGKILL) at random moments, on one and two processes, and begun again:
        what they leave equals that of an undisturbed one, bit for bit
disks   a disk that is full from the n-th write on, one of each place in the code first, then all:
        one sentence that names what was to be written, nothing half-written, and equal results once
        there is room
limits  files may grow to the middle of a write, or to some sizes, and no further: the same
ranks   ranks that are stopped for a while, or for good: equal results, or one sentence
writers two commands at one folder: nothing is lost

All of it is drawn by the seed; each further worker has the next seed, and a share of the cases.
What is done is kept in the folder: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import campaign_files, campaign_runs

BATCH: Final = 200
SAVED_EVERY: Final = 10.0  # seconds
GRACE: Final = 60.0  # seconds for the last case of a worker
FORKED: Final = multiprocessing.get_context("fork")
Row = dict[str, Any]


class Progress:
    """What is known of every part, on disk after each batch; nothing new begins after the end."""

    def __init__(self, folder: Path, seed: int, end: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.seed, self._end = folder, seed, end
        self._path = folder / "progress.json"
        known = json.loads(self._path.read_text()) if self._path.exists() else {}
        self.rows: dict[str, Row] = known

    @property
    def is_over(self) -> bool:
        """Whether the time is spent."""
        return time.monotonic() > self._end

    def of(self, part: str, name: str) -> Row:
        """A row of the table: cases done, seconds, outcomes, and the first case of each."""
        blank = {"part": part, "name": name, "done": 0, "seconds": 0.0, "outcomes": {}, "first": {}}
        return self.rows.setdefault(f"{part}/{name}", blank)

    def take(self, row: Row, cases: Iterator[tuple[int, str]]) -> int:
        """Count cases, and say how many; what is done is written down every few seconds."""
        told, before = time.monotonic(), int(row["done"])
        while not self.is_over and (case := next(cases, None)):
            number, outcome = case
            row["outcomes"][outcome] = row["outcomes"].get(outcome, 0) + 1
            row["first"].setdefault(outcome, f"{self.seed}:{number}")
            row["done"] = number + 1
            if time.monotonic() - told > SAVED_EVERY:
                told = self._save(row, told)
        self._save(row, told)
        return int(row["done"]) - before

    def _save(self, row: Row, told: float) -> float:
        now = time.monotonic()
        row["seconds"] += now - told
        self._path.write_text(json.dumps(self.rows, indent=1) + "\n")
        return now


def damage_files(progress: Progress, total: int, only: Sequence[str]) -> None:
    """`total` cases, shared by all readers, in turns."""
    corpus = progress.folder / "corpus"
    if not corpus.exists():
        corpus.mkdir(parents=True)
        campaign_files.make_corpus(corpus)
    each = -(-total // len(campaign_files.READERS))
    for end in range(BATCH, each + BATCH, BATCH):
        for name in [n for n in campaign_files.READERS if n in only or not only]:
            row = progress.of("files", name)
            numbers = range(row["done"], min(end, each))
            if numbers and not progress.is_over:
                cases = campaign_files.run_cases(name, progress.seed, numbers, corpus)
                progress.take(row, cases)


def disturb(progress: Progress, part: str, total: int, only: Sequence[str]) -> None:
    """`total` disturbances of each kind of command, in turns; of disks one for a write at most."""
    going = {}
    for name in campaign_runs.PARTS[part]:
        if only and name not in only:
            continue
        place = progress.folder / "runs" / f"{part}-{name.replace(' ', '-')}"
        row, begin = progress.of(part, name), campaign_runs.PARTS[part][name]
        going[name] = row, begin(place, progress.seed, row["done"], total)
    while going and not progress.is_over:
        for name, (row, cases) in list(going.items()):
            if not progress.take(row, islice(cases, 1)):
                del going[name]


def work(arguments: argparse.Namespace, number: int, end: float) -> None:
    """All parts, with the seed and the share of a worker."""
    torch.set_num_threads(1)  # children are forked: a pool of threads would not come along
    seed = arguments.seed + number
    progress = Progress(arguments.folder / f"seed-{seed}", seed, end)
    share = partial(share_of, workers=arguments.workers, number=number)
    for part in arguments.parts.split(","):
        if part == "files":
            damage_files(progress, share(arguments.cases), arguments.only)
        else:
            disturb(progress, part, share(arguments.kills), arguments.only)


def share_of(total: int, workers: int, number: int) -> int:
    """How many of `total` fall to a worker: all shares together are the total."""
    return total * (number + 1) // workers - total * number // workers


def summed(folder: Path, seeds: Iterable[int]) -> dict[str, Row]:
    """The rows of all workers, added."""
    rows: dict[str, Row] = {}
    for seed in seeds:
        for key, row in Progress(folder / f"seed-{seed}", seed, 0).rows.items():
            known = rows.setdefault(key, {**row, "done": 0, "seconds": 0, "outcomes": {}})
            known["done"] += row["done"]
            known["seconds"] += row["seconds"]
            known["outcomes"] = dict(Counter(known["outcomes"]) + Counter(row["outcomes"]))
            known["first"] = row["first"] | known["first"]
    return rows


def show(rows: Mapping[str, Row]) -> bool:
    """The table; whether all is well."""
    print(f"{'part':8} {'what':24} {'cases':>7} {'s':>7}  outcomes")
    sound = True
    for row in rows.values():
        bad = {k: v for k, v in row["outcomes"].items() if not campaign_files.is_sound(k)}
        good = ", ".join(f"{v} {k}" for k, v in sorted(row["outcomes"].items()) if k not in bad)
        print(f"{row['part']:8} {row['name']:24} {row['done']:>7} {row['seconds']:>7.0f}  {good}")
        for outcome, count in bad.items():
            print(f"    {count} x {outcome} (first: case {row['first'][outcome]})")
        sound = sound and not bad
    total = sum(row["done"] for row in rows.values())
    print(f"{total} cases, {'all as they should end' if sound else 'NOT all as they should end'}")
    return sound


def main() -> None:
    parser = argparse.ArgumentParser(description="The campaign.")
    parser.add_argument("--parts", default="files,kills,disks,limits,ranks,writers")
    parser.add_argument("--only", nargs="*", default=[], help="rows of the table, by name")
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e6, help="nothing begins after")
    parser.add_argument("--folder", type=Path, default=Path("build/campaign"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    known = {name for rows in campaign_runs.PARTS.values() for name in rows} | {
        *campaign_files.READERS
    }
    if unknown := sorted({*arguments.only} - known):
        parser.error(f"no row {unknown[0]!r}; there are {', '.join(sorted(known))}")
    began, arguments.folder = time.monotonic(), arguments.folder.resolve()
    end = began + arguments.seconds
    seeds = range(arguments.seed, arguments.seed + arguments.workers)
    print(f"seeds {seeds.start} to {seeds.stop - 1}, in {arguments.folder}", flush=True)
    numbers = range(arguments.workers)
    workers = [FORKED.Process(target=work, args=(arguments, n, end)) for n in numbers]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0, end + GRACE - time.monotonic()))
        worker.kill()
    rows = summed(arguments.folder, seeds)
    sound = show(rows) and not any(worker.exitcode for worker in workers)
    if arguments.out:
        document = {"seeds": list(seeds), "seconds": round(time.monotonic() - began),
                    "rows": list(rows.values())}  # fmt: skip
        arguments.out.write_text(json.dumps(document, indent=2) + "\n")
    raise SystemExit(not sound)


if __name__ == "__main__":
    main()
