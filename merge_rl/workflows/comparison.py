"""The end of a run: start, uniform average, best single checkpoint and result on fresh seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from merge_rl.config import OptimizeConfig
from merge_rl.core.intervals import Interval
from merge_rl.interfaces import Tracker
from merge_rl.rng import image_seeds
from merge_rl.storage.runs import RunDir
from merge_rl.workflows.assemble import Job
from merge_rl.workflows.rollout import balanced_labels
from merge_rl.workflows.scoring import Scorer, improvement, summarize

ENTRIES = ("start", "uniform", "best single", "result")


@dataclass(frozen=True)
class Comparison:
    """Scores of the four models on the same fresh seeds."""

    num_images: int
    best_single: str  # name of the checkpoint
    scores: Mapping[str, Sequence[Mapping[str, float]]]  # entry -> repeats -> reference -> FID

    @property
    def references(self) -> list[str]:
        """Names of the statistics that were compared with."""
        return list(self.scores["result"][0])

    @property
    def headline(self) -> str:
        """The reference to judge by: held-out data where there is some."""
        return "heldout" if "heldout" in self.references else "reference"

    def summary(self, entry: str) -> dict[str, Any]:
        """Mean, interval, minimum and values for each reference."""
        return summarize(self.scores[entry])

    def gain(self, other: str, name: str | None = None) -> Interval:
        """Paired interval of (other - result): above 0 the result is better."""
        name = name or self.headline
        return improvement(self.scores["result"], self.scores[other], name)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with None for what could not be scored."""
        gains = {other: self.gain(other) for other in ENTRIES[:-1]}
        document: dict[str, Any] = {
            "metric": "fid",
            "num_images": self.num_images,
            "repeats": len(self.scores["result"]),
            "headline": self.headline,
            "best_single": self.best_single,
            "entries": {entry: self.summary(entry) for entry in ENTRIES},
            "gain_over": {
                k: {"mean": g.mean, "low": g.low, "high": g.high} for k, g in gains.items()
            },
        }
        return {key: _without_nan(value) for key, value in document.items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


class _Scores:
    """Scores by key, each written to the run as soon as it is known."""

    def __init__(self, job: Job, run: RunDir, seed: int) -> None:
        self.job, self.run, self.seed = job, run, seed
        self.known: dict[str, dict[str, float | None]] = run.read("scores.json") or {}
        self.scorer = Scorer({name: ref.stats for name, ref in job.references.items()})

    def get(
        self, key: str, coefficients: Tensor, count: int, *stream: str | int
    ) -> dict[str, float]:
        """Score of `count` images from the stream; from the file if it is known already."""
        if key not in self.known:
            noise = self.job.rollout.rollout.noise(image_seeds(count, self.seed, *stream))
            labels = balanced_labels(count, self.job.num_classes)
            features = self.job.rollout.features(coefficients, noise, labels)
            score = self.scorer.score(features)
            # NaN has no place in JSON.
            self.known[key] = {k: None if math.isnan(v) else v for k, v in score.items()}
            self.run.write("scores.json", self.known)
        else:
            self.job.rollout.rollout.on_images(count)
        return {k: math.nan if v is None else v for k, v in self.known[key].items()}


def compare(
    config: OptimizeConfig, job: Job, coefficients: Tensor, run: RunDir, tracker: Tracker
) -> Comparison:
    """Score the four on seeds that nothing was chosen by; finished scores are not repeated.

    The best single checkpoint is found first, on seeds of its own: choosing and reporting on the
    same seeds would flatter it.
    """
    settings = config.evaluation
    count = len(job.checkpoints)
    scores = _Scores(job, run, config.seed)
    tracker.phase("best single", count * settings.selection_images)
    found = [
        scores.get(
            f"select/{job.checkpoints.names[i]}",
            job.coefficients(i),
            settings.selection_images,
            "select",
        )["reference"]
        for i in range(count)
    ]
    best = min(range(count), key=lambda i: (math.isnan(found[i]), found[i], i))
    entries = {
        "start": job.map(job.map_origin),
        "uniform": job.coefficients(None),
        "best single": job.coefficients(best),
        "result": coefficients,
    }
    total = len(entries) * settings.repeats * settings.num_images
    tracker.phase("compare", total)
    table = {
        entry: [
            scores.get(f"{entry}/{r}", c, settings.num_images, "fresh", r)
            for r in range(settings.repeats)
        ]
        for entry, c in entries.items()
    }
    return Comparison(settings.num_images, job.checkpoints.names[best], table)
