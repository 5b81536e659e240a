"""Scores of merges on seeds of their own, each written to the run as soon as it is known."""

from __future__ import annotations

import math

from torch import Tensor

from merge_rl.rng import image_seeds
from merge_rl.storage.runs import RunDir
from merge_rl.workflows.assemble import Job
from merge_rl.workflows.rollout import MergedRollout, WorkItem, balanced_labels
from merge_rl.workflows.scoring import Scorer
from merge_rl.workflows.second_metric import SecondMetric


class ScoreStore:
    """FID to every reference, by key; a score that the run knows already is not made again."""

    def __init__(self, job: Job, run: RunDir, seed: int) -> None:
        self.job, self.run, self.seed = job, run, seed
        self.known: dict[str, dict[str, float | None]] = run.read("scores.json") or {}
        self.scorer = Scorer({name: ref.stats for name, ref in job.references.items()})
        self._second: SecondMetric | None = None

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
        if key in self.known:
            merged.rollout.on_images(count)
        else:
            features = self._features(merged, key, coefficients, count, *stream)
            self._keep(key, self.scorer.score(features))
        return self._known(key)

    def get_both(
        self, key: str, coefficients: Tensor, count: int, *stream: str | int
    ) -> tuple[dict[str, float], float | None]:
        """The same, and the second metric of the same images; None if the reference allows none."""
        real, second = self.job.references["reference"], f"second/{key}"
        if real.features is None:
            return self.get(key, coefficients, count, *stream), None
        merged = self.job.final_rollout
        if key in self.known and second in self.known:
            merged.rollout.on_images(count)
        else:
            features = self._features(merged, key, coefficients, count, *stream)
            self._second = self._second or SecondMetric(real, str(merged.rollout.device))
            self.known[second] = _plain({"reference": self._second.score(features)})
            self._keep(key, self.scorer.score(features))
        return self._known(key), self._known(second)["reference"]

    def _features(
        self,
        merged: MergedRollout,
        key: str,
        coefficients: Tensor,
        count: int,
        *stream: str | int,
    ) -> Tensor:
        seeds = image_seeds(count, self.seed, *stream)
        item = WorkItem(coefficients, seeds, balanced_labels(count, self.job.num_classes))
        return merged.features_of([item], key)[0]

    def _keep(self, key: str, score: dict[str, float]) -> None:
        self.known[key] = _plain(score)
        self.run.write("scores.json", self.known)

    def _known(self, key: str) -> dict[str, float]:
        return {k: math.nan if v is None else v for k, v in self.known[key].items()}


def _plain(score: dict[str, float]) -> dict[str, float | None]:
    """NaN has no place in JSON."""
    return {k: None if math.isnan(v) else v for k, v in score.items()}
