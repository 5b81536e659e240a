"""Scores of merges on seeds of their own, each written to the run as soon as it is known."""

from __future__ import annotations

import math

from torch import Tensor

from merge_rl.rng import image_seeds
from merge_rl.storage.runs import RunDir
from merge_rl.workflows.assemble import Job
from merge_rl.workflows.rollout import MergedRollout, WorkItem, balanced_labels
from merge_rl.workflows.scoring import Scorer


class ScoreStore:
    """FID to every reference, by key; a score that the run knows already is not made again."""

    def __init__(self, job: Job, run: RunDir, seed: int) -> None:
        self.job, self.run, self.seed = job, run, seed
        self.known: dict[str, dict[str, float | None]] = run.read("scores.json") or {}
        self.scorer = Scorer({name: ref.stats for name, ref in job.references.items()})

    def get(
        self,
        key: str,
        coefficients: Tensor,
        count: int,
        *stream: str | int,
        merged: MergedRollout | None = None,
    ) -> dict[str, float]:
        """Scores of `count` images from the stream; from the file if they are known already."""
        merged = merged or self.job.final_rollout
        if key not in self.known:
            seeds = image_seeds(count, self.seed, *stream)
            item = WorkItem(coefficients, seeds, balanced_labels(count, self.job.num_classes))
            score = self.scorer.score(merged.features_of([item], key)[0])
            # NaN has no place in JSON.
            self.known[key] = {k: None if math.isnan(v) else v for k, v in score.items()}
            self.run.write("scores.json", self.known)
        else:
            merged.rollout.on_images(count)
        return {k: math.nan if v is None else v for k, v in self.known[key].items()}
