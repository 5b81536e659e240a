"""The search as a whole: where it begins, its rounds, and the choice among the finalists."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merge_rl import registry
from merge_rl.config import OptimizeConfig
from merge_rl.core.search_space import SearchSpace
from merge_rl.core.tournament import halving_plan
from merge_rl.interfaces import Searcher, Tracker
from merge_rl.storage.runs import RunDir
from merge_rl.workflows.assemble import Job
from merge_rl.workflows.budget import LEAST, BudgetPlan, plan_budget
from merge_rl.workflows.score_store import ScoreStore
from merge_rl.workflows.search_loop import SearchLoop
from merge_rl.workflows.starts import starts_of
from merge_rl.workflows.tournament import Winner, hold


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    coefficients: Tensor  # (G, K) float64
    start: Tensor  # (G, K), where it began
    start_label: str
    images: int  # all that it generated
    rounds: int
    beginning: Winner
    choice: Winner
    fresh_score: float | None  # of the chosen one: as many images as its last score, other seeds

    @property
    def optimism(self) -> float | None:
        """Search score minus fresh score; below 0, the choice was flattered by its seeds."""
        if self.choice.score is None or self.fresh_score is None:
            return None
        return self.choice.score - self.fresh_score

    @property
    def spent(self) -> dict[str, int]:
        """Images of the search by what they went to; they sum to `images`."""
        start, final = self.beginning.images, self.choice.images
        return {"start": start, "rounds": self.images - start - final, "final": final}

    def as_dict(self) -> dict[str, Any]:
        """For result.json."""
        return {
            "coefficients": self.coefficients.tolist(),
            "start": {"label": self.start_label, "coefficients": self.start.tolist(),
                      **self.beginning.as_dict()},
            "search_images": self.images,
            "images": self.spent,
            "rounds": self.rounds,
            "final": {**self.choice.as_dict(), "fresh_score": self.fresh_score,
                      "optimism": self.optimism},
        }  # fmt: skip

    def to_plain(self) -> dict[str, Any]:
        """All fields as plain data."""
        tensors = {name: getattr(self, name).tolist() for name in ("coefficients", "start")}
        return {**dataclasses.asdict(self), **tensors}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Found:
        """What `to_plain` gave."""
        tensors = {
            name: torch.tensor(values[name], dtype=torch.float64)
            for name in ("coefficients", "start")
        }
        winners = {name: Winner(**values[name]) for name in ("beginning", "choice")}
        return cls(**{**values, **tensors, **winners})


def search(
    config: OptimizeConfig, job: Job, run: RunDir, tracker: Tracker, store: ScoreStore
) -> Found:
    """From the resume point, or the beginning, to the coefficients that are reported."""
    job.final_rollout.rollout.on_images = tracker.advance
    starts = starts_of(config, job.checkpoints, job.map)
    plan = plan_budget(config, len(starts))
    if plan.start:
        tracker.phase("start", sum(rung.entries * rung.images for rung in plan.start))
    beginning = hold("start", starts, plan.start, store)
    theta = job.map.theta_of(starts[beginning.label]) if len(starts) > 1 else None
    loop = SearchLoop(
        config, job, make_searcher(config, job), run, tracker,
        start=theta, spent=beginning.images, limit=plan.limit,
    )  # fmt: skip
    loop.run()
    entries = finalists(loop, starts[beginning.label])
    choice = _choose(entries, plan, store, tracker)
    fresh = None
    if choice.score is not None:
        count = choice.images_each
        fresh = store.get("optimism", entries[choice.label], count, "optimism")["reference"]
    return Found(
        coefficients=entries[choice.label],
        start=starts[beginning.label],
        start_label=beginning.label,
        images=loop.images + choice.images,
        rounds=loop.round_index,
        beginning=beginning,
        choice=choice,
        fresh_score=fresh,
    )


def make_searcher(config: OptimizeConfig, job: Job) -> Searcher:
    """The searcher a config names, for the job's space."""
    plan = plan_budget(config, len(starts_of(config, job.checkpoints, job.map)))
    space = SearchSpace(
        map=job.map,
        names=tuple(job.checkpoints.names),
        nimg=tuple(job.checkpoints.nimg),
        ema_std=tuple(job.checkpoints.ema_std),
        evaluations=plan.rounds * plan.candidates,
    )
    searcher: Searcher = registry.resolve_searcher(config.search.name)(
        config.search, space, config.seed
    )
    return searcher


def finalists(loop: SearchLoop, start: Tensor) -> dict[str, Tensor]:
    """What competes at the end, coefficients (G, K) by what they are; the policy mean first.

    The mean is that of the last round whose samples were finite.
    """
    named = {**loop.searcher.finalists, "mean": loop.result_theta}
    entries = {label: loop.job.map(theta) for label, theta in named.items()}
    entries = {"mean": entries.pop("mean"), **entries, "start": start}
    for index, theta in enumerate(loop.incumbents.thetas):
        entries[f"incumbent {index + 1}"] = loop.job.map(theta)
    distinct: dict[str, Tensor] = {}
    for label, rows in entries.items():
        if not any(torch.equal(rows, other) for other in distinct.values()):
            distinct[label] = rows
    return distinct


def _choose(
    entries: Mapping[str, Tensor], plan: BudgetPlan, store: ScoreStore, tracker: Tracker
) -> Winner:
    rungs = halving_plan(len(entries), plan.final, LEAST) if plan.final else ()
    if rungs:
        tracker.phase("finalists", sum(rung.entries * rung.images for rung in rungs))
    return hold("final", entries, rungs, store)
