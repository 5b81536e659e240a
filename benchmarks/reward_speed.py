"""How fast are the Fréchet rewards of a round's candidates, and are they right?

    python benchmarks/reward_speed.py [--candidates 16] [--device cuda] [--digits] [--out FILE.json]

A pool of 5,000 rows in 2,048 dimensions, of which each candidate replaces the same 50. All methods
see the same rows; the spectra decay as those of Inception features do. What is prepared once for a
pool (an eigendecomposition) is timed on its own, and a candidate's share of it is added. Goals, on
the CPU: the exact reward 12 times and the influence form 150 times as fast a candidate as scipy's
`sqrtm` of the covariances' product with moments from all rows; exact values within 1e-6. `--digits`
adds the rank correlation of both forms over candidates of the embedded digits run: goal 0.95.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scipy.linalg
import scipy.stats
import torch
from torch import Tensor

from merge_rl.config.mapping import load_config
from merge_rl.config.optimize import OptimizeConfig
from merge_rl.core.distances.frechet import FrechetReference
from merge_rl.core.distances.frechet_pool import FrechetPool, Influence, ReferenceFactor
from merge_rl.core.distances.statistics import FeatureStats, feature_stats, replace_rows
from merge_rl.core.sampling.compatibility import balanced_labels
from merge_rl.demo import write_demo
from merge_rl.rng import draw_subset, image_seeds, stream
from merge_rl.storage.checkpoints.checkpoint_set import open_checkpoints
from merge_rl.workflows.assembly.job import Job, build_job
from merge_rl.workflows.assembly.resolve import resolve_config
from merge_rl.workflows.optimize.search import make_searcher
from merge_rl.workflows.reference.file import load_reference
from merge_rl.workflows.rewards.frechet import InfluenceFrechet, Pool, RewardSource, SubsetFrechet

GOALS = {"exact": 12.0, "influence": 150.0, "error": 1e-6, "rank correlation": 0.95}


@dataclass(frozen=True)
class Round:
    """A pool and what candidates put in the place of its first rows."""

    reference: FeatureStats
    features: Tensor  # (N, D) float32
    fresh: Tensor  # (P, n, D) float32

    @property
    def removed(self) -> Tensor:
        return self.features[: self.fresh.shape[1]]

    def after(self, candidate: int) -> Tensor:
        return torch.cat([self.fresh[candidate], self.features[self.fresh.shape[1] :]])


def make_round(dim: int, pool: int, subset: int, candidates: int, device: str) -> Round:
    """Features of real data, of a slightly worse pool, and of candidates that differ a little."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        drawn: Tensor
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)
        return drawn

    # Variances fall like 1/i, then exponentially: a condition number of 1e6.
    index = torch.arange(1, dim + 1, dtype=torch.float64, device=device)
    spread = (10 / index * torch.exp(-6 * index / dim)).sqrt()
    basis, _ = torch.linalg.qr(draw(dim, dim))
    # The model's features are spread a little wider here, narrower there, and turned.
    mixing = torch.eye(dim, dtype=torch.float64, device=device) + 0.1 / dim**0.5 * draw(dim, dim)
    model = spread * torch.exp(0.1 * draw(dim))
    centre = 0.4 + 0.1 * spread * draw(dim)

    def images(count: int, worse: float) -> Tensor:
        rows: Tensor = (draw(count, dim) * model * (1 + worse)) @ mixing @ basis.T
        moved: Tensor = rows + centre + 0.3 * worse * spread @ basis.T
        return moved.float()

    real = 0.4 + (draw(2 * pool, dim) * spread) @ basis.T
    quality = torch.linspace(-0.1, 0.1, candidates).tolist()
    fresh = torch.stack([images(subset, worse) for worse in quality])
    return Round(feature_stats(real), images(pool, 0.0), fresh)


def timed(call: Callable[[], Any], repeats: int, device: str) -> tuple[Any, float]:
    """A result, and the median of `repeats` times in seconds after a first call if there are 2."""
    if repeats > 1:
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return result, statistics.median(times)


def sqrtm_reward(problem: Round, candidate: int) -> float:
    """As FID is usually computed: moments of all rows, the square root of their product."""
    rows = problem.after(candidate).double().cpu().numpy()
    mean, cov = rows.mean(0), torch.cov(torch.from_numpy(rows.T)).numpy()
    target = problem.reference.cov.cpu().numpy()
    root = scipy.linalg.sqrtm(cov @ target).real
    gap = mean - problem.reference.mean.cpu().numpy()
    return -float(gap @ gap + cov.trace() + target.trace() - 2 * root.trace())


def newton_schulz_trace(product: Tensor, iterations: int) -> float:
    """tr √M by the coupled Newton-Schulz iteration (Higham, 2008, section 6.7): matrix products."""
    scale = float(torch.linalg.matrix_norm(product))
    one = torch.eye(len(product)).to(product)
    root, inverse = product / scale, one
    for _ in range(iterations):
        step = 1.5 * one - 0.5 * inverse @ root
        root, inverse = root @ step, step @ inverse
    return float(root.trace()) * math.sqrt(scale)


Row = dict[str, Any]


def one_by_one(problem: Round, options: argparse.Namespace) -> dict[str, Row]:
    """The ways that take a candidate at a time, for a few candidates."""
    plain = FrechetReference.from_stats(problem.reference)
    stats = feature_stats(problem.features)

    def updated(p: int) -> float:
        return -plain.distance(replace_rows(stats, problem.removed, problem.fresh[p]))

    ways: dict[str, tuple[Callable[[int], float], int]] = {
        "sqrtm, all rows (scipy)": (lambda p: sqrtm_reward(problem, p), options.sqrtm),
        "eigvalsh, all rows": (
            lambda p: -plain.distance(feature_stats(problem.after(p))), options.few,
        ),
        "eigvalsh, rows replaced": (updated, options.few),
    }  # fmt: skip
    rows = {}
    for name, (way, wanted) in ways.items():
        number = min(wanted, len(problem.fresh))
        if number:
            values, spent = timed(lambda: list(map(way, range(number))), 1, options.device)  # noqa: B023
            rows[name] = {"prepare_s": 0.0, "candidate_s": spent / number, "values": values}
    return rows


def all_at_once(problem: Round, options: argparse.Namespace) -> dict[str, Row]:
    """The ways that prepare a pool and take all candidates together."""
    factor, stats = ReferenceFactor.from_stats(problem.reference), feature_stats(problem.features)
    removed, fresh, device = problem.removed, problem.fresh, options.device

    def prepare() -> FrechetPool:
        pool = factor.pool(stats)
        _ = pool.distance
        return pool

    pool, prepared = timed(prepare, options.repeats, device)
    influence, more = timed(lambda: Influence.of(pool), options.repeats, device)
    ways: dict[str, tuple[Callable[[], Tensor], float, int]] = {
        "eigvalsh, rank 2n": (
            lambda: pool.distances_with(removed, fresh[: options.few], by_eigenvalues=True),
            prepared, 1,
        ),
        "exact": (lambda: pool.distances_with(removed, fresh), prepared, options.repeats),
        "influence": (
            lambda: pool.distance + influence.shares(removed, fresh).sum(1), prepared + more,
            options.repeats,
        ),
    }  # fmt: skip
    rows = {}
    for name, (way, before, repeats) in ways.items():
        distances, spent = timed(way, repeats, device)
        rows[name] = {
            "prepare_s": before,
            "candidate_s": spent / len(distances),
            "values": (-distances).tolist(),
        }
    if options.newton_schulz:
        after = factor.pool(replace_rows(stats, removed, fresh[0]))
        base = after.distance + 2 * after.overlap
        trace, spent = timed(
            lambda: newton_schulz_trace(after.product, options.newton_schulz), 1, device
        )
        name = f"Newton-Schulz, {options.newton_schulz} iterations"
        rows[name] = {"prepare_s": 0.0, "candidate_s": spent, "values": [2 * trace - base]}
    return rows


def summarize(rows: dict[str, Row], candidates: int) -> dict[str, Any]:
    """Speed-ups over the slowest way and errors against eigenvalues, into the rows."""
    truth = rows["eigvalsh, rows replaced"]["values"]
    first = next(iter(rows.values()))["candidate_s"]
    for row in rows.values():
        row["round_s"] = row["prepare_s"] / candidates + row["candidate_s"]
        row["speedup"] = first / row["candidate_s"]
        row["round_speedup"] = first / row["round_s"]
        pairs = list(zip(row["values"], truth, strict=False))
        row["error"] = max(abs(value - known) / abs(known) for value, known in pairs)
    ranks = scipy.stats.spearmanr(rows["influence"]["values"], rows["exact"]["values"])
    return {"influence_rank_correlation": float(ranks.statistic), "methods": rows}


def digits(rounds: int) -> dict[str, Any]:
    """Rank correlation of both forms over candidates around the newest raw checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        write_demo(Path(folder))
        config = load_config(OptimizeConfig, Path("digits"))
        opened = open_checkpoints(Path(folder) / "edm2", track=config.track)
        config = resolve_config(config, opened)
        job = build_job(config, opened)
        source = RewardSource(name="fid", reference=load_reference(config.reference or ""))
    size, settings = config.reward.images_per_subset, config.reward
    labels = balanced_labels(settings.pool_size, job.num_classes)
    found = []
    start = torch.zeros(job.map.dim, dtype=torch.float64)
    for seed in range(rounds):
        pool = Pool.of(_features(job, start, labels, seed, "pool"), labels)
        thetas = make_searcher(_seeded(config, seed), job).ask()
        subset = draw_subset(labels, size, stream(seed, "subset"))
        made = [_features(job, theta, labels[subset], seed, "round") for theta in thetas]
        draws = [(subset, torch.stack(made))]
        pair = [kind(source).rewards(pool, draws) for kind in (SubsetFrechet, InfluenceFrechet)]
        found.append(float(scipy.stats.spearmanr(*(p.numpy() for p in pair)).statistic))
    return {
        "pool": settings.pool_size, "subset": size, "candidates": len(thetas),
        "rank_correlations": found, "median": statistics.median(found), "minimum": min(found),
    }  # fmt: skip


def _features(job: Job, theta: Tensor, labels: Tensor, seed: int, name: str) -> Tensor:
    noise = job.rollout.rollout.noise(image_seeds(len(labels), seed, name))
    return job.rollout.features(job.map(theta), noise, labels)


def _seeded(config: OptimizeConfig, seed: int) -> OptimizeConfig:
    return OptimizeConfig(**{**vars(config), "seed": seed})


def report(result: dict[str, Any]) -> None:
    """The table, and what became of the goals."""
    title = f"{'seconds':<34}{'prepare':>9}{'candidate':>11}{'round / P':>11}"
    print(f"{title}{'faster':>9}{'in a round':>12}{'error':>10}")
    for name, row in result["methods"].items():
        times = f"{row['prepare_s']:9.3f}{row['candidate_s']:11.4f}{row['round_s']:11.4f}"
        gains = f"{row['speedup']:8.1f}x{row['round_speedup']:11.1f}x"
        print(f"{name:<34}{times}{gains}{row['error']:10.1e}")
    print(f"rank correlation of influence and exact: {result['influence_rank_correlation']:.3f}")
    if "digits" in result:
        ranks = result["digits"]
        values = ", ".join(f"{value:.3f}" for value in ranks["rank_correlations"])
        print(f"on the digits run: {values}; median {ranks['median']:.3f}")
    for name, (value, goal, reached) in result["goals"].items():
        print(f"{name}: {value:.3g}, goal {goal:g}: {'reached' if reached else 'missed'}")


def judge(result: dict[str, Any], scipy_timed: bool) -> dict[str, tuple[float, float, bool]]:
    """(value, goal, whether it is reached) of what could be measured."""
    found = {}
    for name in ("exact", "influence") if scipy_timed else ():
        speedup = result["methods"][name]["speedup"]
        found[f"{name} reward, times faster"] = (speedup, GOALS[name], speedup >= GOALS[name])
    error = result["methods"]["exact"]["error"]
    found["exact reward, relative error"] = (error, GOALS["error"], error <= GOALS["error"])
    if "digits" in result:
        value, goal = result["digits"]["median"], GOALS["rank correlation"]
        found["rank correlation on digits"] = (value, goal, value >= goal)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the Fréchet rewards.")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--pool", type=int, default=5000)
    parser.add_argument("--subset", type=int, default=50)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--few", type=int, default=4, help="candidates of the slow methods")
    parser.add_argument("--sqrtm", type=int, default=1, help="candidates of scipy's sqrtm; 0: none")
    parser.add_argument("--newton-schulz", type=int, default=0, metavar="ITERATIONS")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--digits", type=int, default=0, metavar="ROUNDS")
    parser.add_argument("--threads", type=int, help="[default: torch's]")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes = (options.dim, options.pool, options.subset, options.candidates)
    problem = make_round(*sizes, options.device)
    rows = {**one_by_one(problem, options), **all_at_once(problem, options)}
    result = summarize(rows, options.candidates)
    if options.digits:
        result["digits"] = digits(options.digits)
    result["goals"] = judge(result, bool(options.sqrtm))
    result |= dict(zip(("dim", "pool", "subset", "candidates"), sizes, strict=True))
    result |= {"device": options.device, "threads": torch.get_num_threads()}
    report(result)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
