"""Scores of merges on seeds of their own, each written to the run as soon as it is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from merge_rl.rng import image_seeds
from merge_rl.storage.runs import RunDir
from merge_rl.workflows.assemble import Job
from merge_rl.workflows.rollout import MergedRollout, WorkItem, balanced_labels
from merge_rl.workflows.scoring import Scorer
from merge_rl.workflows.second_metric import SecondMetric


@dataclass(frozen=True, eq=False)
class Request:
    """A score to know: of `count` images that coefficients (G, K) make of a stream of seeds."""

    key: str
    coefficients: Tensor
    count: int
    stream: tuple[str | int, ...]
    second: bool = False  # also by the metric that no search optimises, where there is one


class ScoreStore:
    """FID to every reference, by key; a score that the run knows already is not made again."""

    def __init__(self, job: Job, run: RunDir, seed: int) -> None:
        self.job, self.run, self.seed = job, run, seed
        self.known: dict[str, dict[str, float | None]] = run.read("scores.json") or {}
        self.scorer = Scorer({name: ref.stats for name, ref in job.references.items()})
        self._second: SecondMetric | None = None  # made on use

    def get(
        self, key: str, coefficients: Tensor, count: int, *stream: str | int
    ) -> dict[str, float]:
        """One score; see `get_all`."""
        return self.get_all([Request(key, coefficients, count, stream)])[0]

    def get_all(
        self, requests: Sequence[Request], merged: MergedRollout | None = None
    ) -> list[dict[str, float]]:
        """Scores in order; from the file where they are known already.

        One after the other, each written at once; as many together as give every process a batch
        where there are several.
        """
        merged = merged or self.job.final_rollout
        missing = []
        for request in requests:
            if all(key in self.known for key in self._keys(request)):
                merged.rollout.on_images(request.count)
            else:
                missing.append(request)
        while missing:
            wanted = merged.processes * merged.rollout.batch
            step = max(1, wanted // missing[0].count) if merged.processes > 1 else 1
            self._make(missing[:step], merged)
            del missing[:step]
        return [self._read(request.key) for request in requests]

    def _make(self, requests: Sequence[Request], merged: MergedRollout) -> None:
        items = [
            WorkItem(
                request.coefficients,
                image_seeds(request.count, self.seed, *request.stream),
                balanced_labels(request.count, self.job.num_classes),
            )
            for request in requests
        ]
        made = merged.features_of(items, f"score {requests[0].key}")
        for request, features in zip(requests, made, strict=True):
            self.known[request.key] = _plain(self.scorer.score(features))
            for key in self._keys(request)[1:]:
                self.known[key] = _plain({"reference": self._second_metric().score(features)})
        self.run.write("scores.json", self.known)

    def second(self, key: str) -> float | None:
        """The second metric of a score that was asked for with it; None if there is none."""
        found = self.known.get(f"second/{key}")
        return None if found is None else self._read(f"second/{key}")["reference"]

    def _keys(self, request: Request) -> list[str]:
        kept = self.job.references["reference"].features is not None
        second = [f"second/{request.key}"] if request.second and kept else []
        return [request.key, *second]

    def _second_metric(self) -> SecondMetric:
        if self._second is None:
            device = str(self.job.final_rollout.rollout.device)
            self._second = SecondMetric(self.job.references["reference"], device)
        return self._second

    def _read(self, key: str) -> dict[str, float]:
        return {k: math.nan if v is None else v for k, v in self.known[key].items()}


def _plain(score: dict[str, float]) -> dict[str, float | None]:
    """NaN has no place in JSON."""
    return {k: None if math.isnan(v) else v for k, v in score.items()}
