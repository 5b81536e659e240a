"""What can be done to the files and processes of this project, and what it came to.

    python -m benchmarks.campaign [--parts files,kills,disks,ranks,writers] [--cases 100000]
                                  [--kills 100] [--only NAME ...] [--seed 0]
                                  [--folder build/campaign] [--out FILE.json]

files   damaged and hostile files for every reader: nothing runs, hangs, dies or is half written
kills   commands killed (SIGKILL) at random moments, on one and two processes, and begun again:
        what they leave equals that of an undisturbed one, bit for bit
disks   a disk that is full from the n-th write on, for every n: one sentence that names what was
        to be written, nothing half-written, and equal results once there is room
ranks   ranks that are stopped for a while, or for good: equal results, or one sentence
writers two commands at one folder: nothing is lost

All of it is drawn by the seed. What is done is kept in the folder: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import campaign_files, campaign_runs

BATCH: Final = 200
SAVED_EVERY: Final = 10.0  # seconds
Row = dict[str, Any]


class Progress:
    """What is known of every part, on disk after each batch."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._path, self.seed = folder / f"progress-{seed}.json", seed
        known = json.loads(self._path.read_text()) if self._path.exists() else {}
        self.rows: dict[str, Row] = known

    def of(self, part: str, name: str) -> Row:
        """A row of the table: cases done, seconds, outcomes, and the first case of each."""
        blank = {"part": part, "name": name, "done": 0, "seconds": 0.0, "outcomes": {}, "first": {}}
        return self.rows.setdefault(f"{part}/{name}", blank)

    def take(self, row: Row, cases: Iterator[tuple[int, str]]) -> None:
        """Count cases; what is done is written down every few seconds."""
        told = time.monotonic()
        for number, outcome in cases:
            row["outcomes"][outcome] = row["outcomes"].get(outcome, 0) + 1
            row["first"].setdefault(outcome, number)
            row["done"] = number + 1
            if time.monotonic() - told > SAVED_EVERY:
                told = self._save(row, told)
        self._save(row, told)

    def _save(self, row: Row, told: float) -> float:
        now = time.monotonic()
        row["seconds"] += now - told
        self._path.write_text(json.dumps(self.rows, indent=1) + "\n")
        return now


def damage_files(progress: Progress, folder: Path, total: int, only: Sequence[str]) -> None:
    """`total` cases, shared by all readers, in turns."""
    corpus = folder / "corpus"
    if not corpus.exists():
        corpus.mkdir(parents=True)
        campaign_files.make_corpus(corpus)
    each = -(-total // len(campaign_files.READERS))
    for end in range(BATCH, each + BATCH, BATCH):
        for name in only or campaign_files.READERS:
            row = progress.of("files", name)
            numbers = range(row["done"], min(end, each))
            if numbers:
                cases = campaign_files.run_cases(name, progress.seed, numbers, corpus)
                progress.take(row, cases)


def disturb(progress: Progress, folder: Path, part: str, total: int, only: Sequence[str]) -> None:
    """`total` disturbances of each kind of command; of disks one for every write."""
    for name in only or campaign_runs.PARTS[part]:
        cases = campaign_runs.PARTS[part][name]
        row = progress.of(part, name)
        place = folder / "runs" / f"{part}-{name.replace(' ', '-')}"
        progress.take(row, cases(place, progress.seed, row["done"], total))


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
    parser.add_argument("--parts", default="files,kills,disks,ranks,writers")
    parser.add_argument("--only", nargs="*", default=[], help="rows of the table, by name")
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("build/campaign"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # children are forked: a pool of threads would not come along
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(folder, arguments.seed)
    print(f"seed {arguments.seed}, in {folder}", flush=True)
    for part in arguments.parts.split(","):
        if part == "files":
            damage_files(progress, folder, arguments.cases, arguments.only)
        else:
            disturb(progress, folder, part, arguments.kills, arguments.only)
    sound = show(progress.rows)
    if arguments.out:
        document = {"seed": arguments.seed, "rows": list(progress.rows.values())}
        arguments.out.write_text(json.dumps(document, indent=2) + "\n")
    raise SystemExit(not sound)


if __name__ == "__main__":
    main()
