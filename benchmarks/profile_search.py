"""Where the rounds of a search spend their time: no phase but the networks should take 2 %.

    python -m benchmarks.profile_search [--sit | --xs] [--budget 2500] [--out FILE.json]

A default search on the embedded digits, its EDM2 or (`--sit`) its SiT, or (`--xs`) on snapshots
with the shapes of EDM2-XS whose weights are random. Rounds alone count, not what comes before them.
Processor time of the threads that work, each phase without those inside of it, so that other
programs on the machine change little. One worker, one thread.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

import merge_rl as mrl
from benchmarks.merge_speed import write_files
from merge_rl.core.merging.live_model import LiveModel
from merge_rl.demo import write_demo
from merge_rl.storage.runs import RunDir
from merge_rl.workflows.evaluate import SecondMetric
from merge_rl.workflows.optimize.rounds import SearchLoop
from merge_rl.workflows.rewards import RewardGradient
from merge_rl.workflows.rewards.sum import RewardSum
from merge_rl.workflows.rollout import Rollout, differentiable

GOAL = 0.02
NETWORKS = ("network", "gradients", "decoder", "features")


class _Done(Exception):  # noqa: N818
    """The rounds are over; what comes after them is not looked at."""


class Phases:
    """Processor seconds by phase, without what the phases inside took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._own, self._lock = threading.local(), threading.Lock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        inside = self._own.__dict__.setdefault("inside", [])
        began = time.thread_time()
        inside.append(0.0)
        try:
            yield
        finally:
            spent = time.thread_time() - began
            with self._lock:
                self.seconds[name] += spent - inside.pop()
            if inside:
                inside[-1] += spent

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Count every call of a method of a class, or of an object, to a phase."""
        original: Callable[..., Any] = getattr(owner, method)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return original(*args, **kwargs)

        setattr(owner, method, timed)


def profile(folder: Path, out: Path, budget: int, **settings: Any) -> dict[str, float]:
    """Share of each phase of a search's rounds."""
    found, original = Phases(), SearchLoop.__init__

    def watched(loop: SearchLoop, *args: Any, **kwargs: Any) -> None:
        original(loop, *args, **kwargs)
        rollout = loop.job.rollout.rollout
        found.watch(type(rollout.model), "forward", "network")
        found.watch(type(rollout.autoencoder), "decode", "decoder")
        found.watch(type(rollout.extractor), "__call__", "features")
        found.watch(loop.searcher, "ask", "searcher")
        found.watch(loop.searcher, "tell", "searcher")

    def alone(loop: SearchLoop) -> None:
        found.seconds.clear()  # the start was chosen before networks were watched
        with found.phase("everything else"):
            rounds(loop)
        raise _Done

    rounds = SearchLoop.run
    for own, replacement in {"__init__": watched, "run": alone}.items():
        setattr(SearchLoop, own, replacement)
    for owner, method, name in (
        (SearchLoop, "_save", "resume point"),
        (RunDir, "append_event", "events"), (Rollout, "noise", "noise"),
        (Rollout, "latents", "solver"), (LiveModel, "set_coefficients", "merge"),
        (RewardSum, "scores", "reward"), (RewardSum, "pool_distance", "distance of the pool"),
        (differentiable, "sample_with", "solver"), (differentiable, "pull_back", "decoder"),
        (differentiable, "coefficient_gradient", "gradients of coefficients"),
        (differentiable, "room_for", "memory of a gradient"),
        (RewardGradient, "level", "halves of the pool"),
        (RewardGradient, "cotangents", "gradients of the reward"),
        (SecondMetric, "score", "second metric"),
        (torch.autograd, "grad", "gradients"), (torch.autograd, "backward", "gradients"),
    ):  # fmt: skip
        found.watch(owner, method, name)
    with suppress(_Done):
        mrl.optimize(folder, out=out, budget=budget, progress=False, **settings)
    total = sum(found.seconds.values())
    return {name: spent / total for name, spent in sorted(found.seconds.items(), key=_last)[::-1]}


def _last(pair: tuple[str, float]) -> float:
    return pair[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--xs", action="store_true", help="shapes of EDM2-XS instead of digits")
    parser.add_argument("--sit", action="store_true", help="the digits' SiT instead of its EDM2")
    parser.add_argument("--budget", type=int, default=2500)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_demo(folder / "digits")
        sources, settings = folder / "digits" / ("sit" if given.sit else "edm2"), {"track": "raw"}
        if given.xs:
            sources, settings = folder / "xs", {}
            sources.mkdir()
            write_files(sources, 3, 0)
        shares = profile(sources, folder / "run", given.budget, **settings)
    print(f"{'phase':24} share")
    for name, share in shares.items():
        verdict = "" if name in NETWORKS or share < GOAL else "  above 2 %"
        print(f"{name:24} {share:6.2%}{verdict}")
    if given.out:
        given.out.write_text(json.dumps(shares, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
