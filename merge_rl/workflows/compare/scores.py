"""The outcome of a comparison of searchers: fresh scores, medians and ranges over seeds."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from merge_rl.config import OptimizeConfig
from merge_rl.core.distances.intervals import summarize
from merge_rl.errors import StatisticsError
from merge_rl.interfaces import Tracker
from merge_rl.storage.runs import RunDir
from merge_rl.workflows.assembly import Job
from merge_rl.workflows.compare.trials import BASELINES, SearcherSpec, Trial
from merge_rl.workflows.evaluate import Request, ScoreStore


@dataclass(frozen=True, eq=False)
class ScoredTrial:
    """A search with its scores on the shared fresh seeds."""

    trial: Trial
    scores: Sequence[Mapping[str, float]]  # repeat -> reference -> FID, and a second metric
    calls: int  # network evaluations an image
    curve: Sequence[Mapping[str, float]]  # "images" and FID by reference, along the budget

    def mean(self, name: str) -> float:
        """Over repeats."""
        return statistics.fmean(score[name] for score in self.scores)

    @property
    def evaluations(self) -> int:
        """Of the network, an image with its gradient as three images."""
        return self.calls * self.trial.images

    @property
    def overhead(self) -> float | None:
        """Share of the time that did not go to sampling and features; None without images."""
        sampling = self.trial.rollout_seconds
        return 1 - sampling / self.trial.seconds if sampling > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = self.trial.found
        return {
            "seed": self.trial.config.seed,
            "reward": self.trial.config.reward.text,
            "subset_size": self.trial.config.reward.images_per_subset,
            "images": self.trial.images,
            "rounds": found["rounds"],
            "evaluations": self.evaluations,
            "seconds": self.trial.seconds,
            "overhead": self.overhead,
            "start": found["start"]["label"],
            "chosen": found["final"]["chosen"],
            "optimism": found["final"]["optimism"],
            "coefficients": found["coefficients"],
            "scores": summarize(self.scores),
            "curve": list(self.curve),
        }


def median(values: Sequence[float | None]) -> float | None:
    """Of values where NaN is worse than all; None where it would not be finite, or none are."""
    known = [math.inf if math.isnan(value) else value for value in values if value is not None]
    middle = statistics.median(known) if known else math.inf
    return middle if math.isfinite(middle) else None


def spread_of(values: Sequence[float]) -> dict[str, Any]:
    """Median and range over seeds, with the values."""
    finite = [value for value in values if math.isfinite(value)]
    whole = len(finite) == len(values)
    return {
        "median": median(values),
        "low": min(finite) if finite else None,
        "high": max(finite) if whole else None,
        "values": list(values),
    }


def coefficient_spread(trials: Sequence[Trial]) -> float | None:
    """Median over coefficients of their standard deviation over seeds; None for one seed."""
    if len(trials) < 2:
        return None
    stacked = torch.stack([trial.coefficients for trial in trials])
    return float(stacked.std(dim=0).flatten().quantile(0.5))


def ranking_line(
    spec: SearcherSpec, trials: Sequence[ScoredTrial], names: Sequence[str]
) -> dict[str, Any]:
    """A line of the ranking, for JSON; `names` are those of the references."""
    plain = [scored.trial for scored in trials]
    metrics = trials[0].scores[0]
    found = {name: spread_of([scored.mean(name) for scored in trials]) for name in metrics}
    curves = zip(*(scored.curve for scored in trials), strict=True)
    return {
        "searcher": spec.label,
        "name": spec.name,
        "settings": dict(spec.settings),
        "images": int(statistics.median(trial.images for trial in plain)),
        "evaluations": int(statistics.median(scored.evaluations for scored in trials)),
        "fid": {name: found.pop(name) for name in names},
        "others": found,
        "optimism": median([trial.found["final"]["optimism"] for trial in plain]),
        "seconds": median([trial.seconds for trial in plain]),
        "overhead": median([scored.overhead for scored in trials]),
        "coefficient_spread": coefficient_spread(plain),
        "largest_coefficient": max(float(trial.coefficients.abs().max()) for trial in plain),
        "curve": [
            {
                "images": points[0]["images"],
                **{name: spread_of([point[name] for point in points]) for name in names},
            }
            for points in curves
        ],
        "runs": [scored.as_dict() for scored in trials],
    }


def add_ratios(
    searchers: Sequence[dict[str, Any]], fixed: Mapping[str, Mapping[str, Any]], headline: str
) -> dict[str, Any]:
    """Put each searcher's "ratio" to the best free entry into its line; what it is a ratio to.

    "best_free" is the best of the fixed merges; "best_baseline" may be a searcher that does no
    more than compare merges which everybody knows, by its median.
    """
    free = {name: entry["fid"][headline]["mean"] for name, entry in fixed.items()}
    free = {name: value for name, value in free.items() if not math.isnan(value)}
    known = {
        line["searcher"]: line["fid"][headline]["median"]
        for line in searchers
        if line["name"] in BASELINES
    }
    baselines = free | {name: value for name, value in known.items() if value is not None}
    best_free, best_baseline = _least(free), _least(baselines)
    for line in searchers:
        middle = line["fid"][headline]["median"]
        for key, best in (("ratio", best_free), ("ratio_to_baseline", best_baseline)):
            line[key] = middle / best["fid"] if best and middle is not None else None
    return {"best_free": best_free, "best_baseline": best_baseline}


def _least(values: Mapping[str, float]) -> dict[str, Any] | None:
    if not values:
        return None
    name = min(values, key=lambda key: values[key])
    return {"entry": name, "fid": values[name]}


Scores = dict[str, float]
"""Reference -> FID."""


class FreshScores:
    """FID of coefficients on seeds that depend on one seed alone, not on any search's.

    A score is kept under what was scored, so that merges that several searches end in are
    generated once. StatisticsError where the extractor's features are not finite.
    """

    def __init__(self, run: RunDir, seed: int, tracker: Tracker) -> None:
        self._run, self._seed, self._tracker = run, seed, tracker
        self._store: ScoreStore | None = None

    def repeats(
        self, job: Job, config: OptimizeConfig, coefficients: Tensor, name: str
    ) -> list[Scores]:
        """Of N images, once a repeat; N and repeats are those of the config's evaluation.

        By a metric too that no search optimises, under its name.
        """
        settings = config.evaluation
        self._tracker.phase(f"{name}: fresh seeds", settings.repeats * settings.images)
        return [
            self._get(job, config, coefficients, settings.images, "compare", repeat, second=True)
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
        count = config.evaluation.selection
        self._tracker.phase("best single checkpoint", len(job.checkpoints) * count)
        found = [
            self._get(job, config, job.coefficients(i), count, "compare", "select")["reference"]
            for i in range(len(job.checkpoints))
        ]
        return min(range(len(found)), key=lambda i: (math.isnan(found[i]), found[i], i))

    def floor(self, job: Job, config: OptimizeConfig) -> float | None:
        """Distance between the reference and the held-out data; None without these."""
        references = {name: reference.stats for name, reference in job.references.items()}
        return self._of(job, config).scorer.floor(references)

    def _of(self, job: Job, config: OptimizeConfig) -> ScoreStore:
        final = job.final_rollout
        if self._store is None or self._store.job.final_rollout is not final:
            self._store = ScoreStore(job, self._run, self._seed, config.rules)
        final.rollout.on_images = self._tracker.advance
        return self._store

    def _get(
        self, job: Job, config: OptimizeConfig, rows: Tensor, count: int, *stream: str | int,
        second: bool = False,
    ) -> Scores:  # fmt: skip
        store = self._of(job, config)
        key = "/".join([*map(str, stream), str(count), _digest(rows, config)])
        (found,) = store.get_all([Request(key, rows, count, stream, second)])
        if failures := store.failures(key):
            text = f"no score on fresh seeds: {failures.said(job.rollout.rollout.extractor.name)}"
            if failures.features:
                raise StatisticsError(text)
            self._tracker.event({"kind": "warning", "text": text})
        return {**found, store.second_metric.name: store.second(key)} if second else found


def _digest(rows: Tensor, config: OptimizeConfig) -> str:
    """What tells the merge of coefficients (G, K), to 12 digits, from others of the checkpoints."""
    rows = rows.round(decimals=12) + 0.0  # no -0.0
    shared = bool((rows == rows[0]).all())
    groups = {} if shared else dict(config.merge.groups)
    what = [rows[:1].tolist() if shared else rows.tolist(), groups, config.merge.start]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


FIXED: Final = ("newest", "uniform average", "best single")


def fixed_merges(job: Job, best: int) -> dict[str, Tensor]:
    """Merges that cost no search, by name: newest, uniform average, best single checkpoint."""
    return dict(
        zip(FIXED, map(job.coefficients, (job.checkpoints.newest, None, best)), strict=True)
    )


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
