"""Scores of merges on the fresh seeds that all searches of a comparison share."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from merge_rl.config import OptimizeConfig
from merge_rl.interfaces import Tracker
from merge_rl.storage.runs import RunDir
from merge_rl.workflows.assemble import Job
from merge_rl.workflows.score_store import ScoreStore
from merge_rl.workflows.trials import Trial

Scores = dict[str, float]
"""Reference -> FID."""


class FreshScores:
    """FID of coefficients on seeds that depend on one seed alone, not on any search's.

    A score is kept under what was scored, so that merges that several searches end in are
    generated once.
    """

    def __init__(self, run: RunDir, seed: int, tracker: Tracker) -> None:
        self._run, self._seed, self._tracker = run, seed, tracker
        self._store: ScoreStore | None = None

    def repeats(
        self, job: Job, config: OptimizeConfig, coefficients: Tensor, name: str
    ) -> list[Scores]:
        """Of N images, once a repeat; N and repeats are those of the config's evaluation."""
        settings = config.evaluation
        self._tracker.phase(f"{name}: fresh seeds", settings.repeats * settings.num_images)
        return [
            self._get(job, config, coefficients, settings.num_images, "compare", repeat)
            for repeat in range(settings.repeats)
        ]

    def along(
        self, job: Job, config: OptimizeConfig, merges: Sequence[Tensor], count: int, name: str
    ) -> list[Scores]:
        """Of `count` images each, on the seeds of the first repeat."""
        self._tracker.phase(f"{name}: along the search", len(merges) * count)
        return [self._get(job, config, merge, count, "compare", 0) for merge in merges]

    def best_single(self, job: Job, config: OptimizeConfig) -> int:
        """Index of the checkpoint with the lowest FID to the reference, on seeds of its own."""
        count = config.evaluation.selection_images
        self._tracker.phase("best single checkpoint", len(job.checkpoints) * count)
        found = [
            self._get(job, config, job.coefficients(i), count, "compare", "select")["reference"]
            for i in range(len(job.checkpoints))
        ]
        return min(range(len(found)), key=lambda i: (math.isnan(found[i]), found[i], i))

    def _get(
        self, job: Job, config: OptimizeConfig, rows: Tensor, count: int, *stream: str | int
    ) -> Scores:
        final = job.final_rollout
        if self._store is None or self._store.job.final_rollout is not final:
            self._store = ScoreStore(job, self._run, self._seed)
        final.rollout.on_images = self._tracker.advance
        key = "/".join([*map(str, stream), str(count), _digest(rows, config)])
        return self._store.get(key, rows, count, *stream)


def _digest(rows: Tensor, config: OptimizeConfig) -> str:
    """What tells the merge of coefficients (G, K), to 12 digits, from others of the checkpoints."""
    rows = rows.round(decimals=12) + 0.0  # no -0.0
    shared = bool((rows == rows[0]).all())
    groups = {} if shared else dict(config.merge.groups)
    what = [rows[:1].tolist() if shared else rows.tolist(), groups, config.merge.start]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def fixed_merges(job: Job, best: int) -> dict[str, Tensor]:
    """Merges that cost no search, by name: newest, uniform average, best single checkpoint."""
    return {
        "newest": job.coefficients(job.checkpoints.newest),
        "uniform average": job.coefficients(None),
        "best single": job.coefficients(best),
    }


def curve_scores(
    scores: FreshScores, job: Job, trial: Trial, count: int, name: str
) -> list[dict[str, float]]:
    """FID to each reference along a search, with "images"; [] for a count of 0."""
    if count == 0:
        return []
    origin = job.map(torch.zeros(job.map.dim, dtype=torch.float64))
    points = trial.curve(origin)
    found = scores.along(job, trial.config, [rows for _, rows in points], count, name)
    return [{"images": images, **score} for (images, _), score in zip(points, found, strict=True)]
