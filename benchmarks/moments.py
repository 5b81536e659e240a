"""Replacing a subset in the moments of a pool, against recomputing them from all rows.

Prints a small table and, with `--out`, writes the same numbers as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from merge_rl.core.distances.statistics import FeatureStats, feature_stats, replace_rows


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median wall-clock time of a call, after one call to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Largest deviation, relative to the largest expected magnitude."""
    return float((value - expected).abs().max() / expected.abs().max())


def measure(dim: int, pool: int, subset: int, repeats: int, seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    # Shifted and unevenly scaled, as features are: zero mean and unit variance would be too kind.
    spread = torch.logspace(-2, 0, dim)
    before = 0.4 + spread * torch.randn(pool, dim, generator=generator)
    old = torch.randperm(pool, generator=generator)[:subset]
    new = 0.5 + spread * torch.randn(subset, dim, generator=generator)
    after = before.clone()
    after[old] = new
    stats: FeatureStats = feature_stats(before)
    updated, expected = replace_rows(stats, before[old], new), feature_stats(after)
    update = seconds(lambda: replace_rows(stats, before[old], new), repeats)
    recompute = seconds(lambda: feature_stats(after), repeats)
    return {
        "dim": dim,
        "pool": pool,
        "subset": subset,
        "threads": torch.get_num_threads(),
        "replace_rows_s": update,
        "feature_stats_s": recompute,
        "speedup": recompute / update,
        "mean_error": relative_error(updated.mean, expected.mean),
        "cov_error": relative_error(updated.cov, expected.cov),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--pool", type=int, default=5000)
    parser.add_argument("--subset", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    # One by default: where other work shares the cores, short parallel regions wait for it and the
    # ratio measures the machine's load.
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = measure(options.dim, options.pool, options.subset, options.repeats, options.seed)
    for name, value in result.items():
        print(f"{name:16} {value:.4g}")
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
