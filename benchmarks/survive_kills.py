"""Does a search that loses ranks end as one that loses none?

    python -m benchmarks.survive_kills [--runs 10] [--ranks 2] [--seed 0] [--out FILE.json]

Each run is a search of the embedded digits run under torchrun with restarts, in which a rank drawn
at random is killed (SIGKILL) at a time drawn at random, once or twice. The phases in which it
happened are told, from the run's own files. Goal: the coefficients, the scores and the merged
weights of every run equal those of an undisturbed search on one process, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from merge_rl.demo import write_demo

SETTINGS = {
    "track": "raw",
    "budget": 900,
    "sampler": {"num_steps": 4},
    "reward": {"pool_size": 200, "subset_size": 50, "refresh_size": 50},
    "search": {"population": 4},
    "evaluation": {"num_images": 50, "repeats": 3, "selection_images": 20},
}
COMPARED = ("result.json", "scores.json", "state.safetensors", "merged/model.safetensors")


def command(ranks: int, folder: Path, out: Path) -> list[str]:
    """One search, by torchrun if there are several ranks."""
    config = folder / "config.json"  # JSON is YAML
    config.write_text(json.dumps(SETTINGS))
    own = ["-m", "merge_rl", "optimize", str(folder / "edm2"), "--config", str(config)]
    own += ["--out", str(out)]
    if ranks == 1:
        return [sys.executable, *own]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={ranks}", "--max-restarts=5", *own]


def workers_of(launcher: int) -> list[int]:
    """Process ids of the ranks: the launcher's children."""
    path = Path(f"/proc/{launcher}/task/{launcher}/children")
    pids = [int(pid) for pid in path.read_text().split()] if path.exists() else []
    return [pid for pid in pids if b"merge_rl" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def phase_of(run: Path) -> str:
    """How far a run has got, from its files."""
    if (run / "result.json").exists():
        return "end"
    if (run / "scores.json").exists():
        known = json.loads((run / "scores.json").read_text())
        return f"comparison, {len(known)} scores"
    if (run / "state.safetensors").exists():
        return f"round {len((run / 'events.jsonl').read_text().splitlines())}"
    return "first pool" if run.exists() else "start"


def disturbed(
    ranks: int, folder: Path, out: Path, generator: random.Random, seconds: float
) -> list[dict[str, Any]]:
    """A search in which ranks are killed; when, which and in which phase."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    times = sorted(generator.uniform(0.1, 0.95) * seconds for _ in range(generator.choice((1, 2))))
    process = subprocess.Popen(
        command(ranks, folder, out), env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    began, kills = time.monotonic(), []
    for moment in times:
        while time.monotonic() - began < moment and process.poll() is None:
            time.sleep(0.02)
        pids = workers_of(process.pid)
        if pids and process.poll() is None:
            rank = generator.randrange(len(pids))
            kills.append({"rank": rank, "seconds": round(moment, 1), "phase": phase_of(out)})
            os.kill(pids[rank], signal.SIGKILL)
    if process.wait(timeout=900) != 0:
        raise SystemExit(f"a search did not survive {kills}")
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description="Searches that lose ranks.")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_demo(folder)
        subprocess.run(
            command(1, folder, folder / "alone"), env=environment, check=True, capture_output=True
        )
        began = time.monotonic()
        whole = command(arguments.ranks, folder, folder / "whole")
        subprocess.run(whole, env=environment, check=True, capture_output=True)
        seconds = time.monotonic() - began
        print(f"undisturbed on {arguments.ranks} ranks: {seconds:.1f} s")
        rows = []
        for index in range(arguments.runs):
            out = folder / f"run-{index}"
            kills = disturbed(arguments.ranks, folder, out, generator, seconds)
            differ = [
                n for n in COMPARED
                if (out / n).read_bytes() != (folder / "alone" / n).read_bytes()
            ]  # fmt: skip
            rows.append({"run": index, "kills": kills, "differ": differ})
            where = "; ".join(f"rank {k['rank']} at {k['seconds']} s ({k['phase']})" for k in kills)
            print(f"{index:>3}  {differ or 'equal'}  {where}", flush=True)
    bad = sum(bool(row["differ"]) for row in rows)
    print(f"{len(rows) - bad} of {len(rows)} equal to the search on one process, bit for bit")
    if arguments.out:
        document = {"ranks": arguments.ranks, "seed": arguments.seed, "rows": rows}
        arguments.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
