"""Peak memory and time of precision, recall, density and coverage, beyond the features.

A child process makes both feature sets, notes what it holds, computes, and reads its peak (VmHWM,
Linux only): a process of its own has no earlier peak to hide behind. The default size takes 2 N²
distances of D dimensions, minutes; `--rows 10000` takes a 25th of it.

Prints a small table and, with `--out`, writes the same numbers as JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

MIB = 2**20


def measure(rows: int, dim: int, k: int, max_mib: int, threads: int, seed: int) -> dict[str, float]:
    import torch

    from merge_rl.core.distances.neighbours import block_rows, prdc

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(seed)
    # A point set of few intrinsic dimensions, as features are: in all of them, distances of random
    # points are nearly equal and every share is near 0.
    basis = torch.randn(32, dim, generator=generator)
    real, fake = (
        torch.empty(rows, dim).copy_(torch.randn(rows, 32, generator=generator) @ basis)
        for _ in range(2)
    )
    prdc(real[:100], fake[:100], k)  # libraries load and start their threads
    before = resident("VmRSS")
    start = time.perf_counter()
    shares = prdc(real, fake, k, max_bytes=max_mib * MIB)
    seconds = time.perf_counter() - start
    return {
        "rows": rows,
        "dim": dim,
        "threads": threads,
        "max_mib": max_mib,
        "block_rows": block_rows(dim, max_mib * MIB),
        "features_mib": 2 * real.numel() * real.element_size() / MIB,
        "peak_mib": resident("VmHWM") / MIB,
        "beyond_features_mib": (resident("VmHWM") - before) / MIB,
        "seconds": seconds,
        **shares._asdict(),
    }


def resident(key: str) -> int:
    """Bytes of memory that this process holds (VmRSS) or has held at most (VmHWM)."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise SystemExit(f"this system does not tell {key} of a process")
    return int(found[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rows", type=int, default=50_000, help="N of each of the two sets")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--neighbours", type=int, default=5)
    parser.add_argument("--max-mib", type=int, default=512, help="the bound given to prdc")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        result = measure(
            options.rows, options.dim, options.neighbours, options.max_mib, options.threads,
            options.seed,
        )  # fmt: skip
        print(json.dumps(result))
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--child"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = json.loads(output)
    for name, value in result.items():
        print(f"{name:20} {value:.4g}")
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
