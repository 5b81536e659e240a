"""The final comparison: start, uniform average, best checkpoint and result on fresh seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from merge_rl.config import (
    EvaluationConfig,
    OptimizeConfig,
    SamplerConfig,
    from_mapping,
    sde_counterpart,
    without_nan,
)
from merge_rl.core.distances.intervals import Interval, improvement, mean_interval, summarize
from merge_rl.core.sampling.compatibility import VELOCITY, prediction_of
from merge_rl.errors import StatisticsError
from merge_rl.interfaces import Tracker
from merge_rl.workflows.assembly import Job
from merge_rl.workflows.evaluate.features import sampler_summary
from merge_rl.workflows.evaluate.score_store import Request, ScoreStore
from merge_rl.workflows.report import interval, metric_text
from merge_rl.workflows.rollout import MergedRollout

ENTRIES = ("start", "uniform", "best single", "result")


class _Table:
    """What can be read from scores of several entries on the same seeds."""

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

    def _entries(self) -> dict[str, Any]:
        others = [entry for entry in self.scores if entry != "result"]
        gains = {other: self.gain(other) for other in others}
        return {
            "entries": {entry: self.summary(entry) for entry in self.scores},
            "gain_over": {
                k: {"mean": g.mean, "low": g.low, "high": g.high} for k, g in gains.items()
            },
        }


@dataclass(frozen=True)
class SamplerComparison(_Table):
    """Start and result under another sampler than that of the rewards, on the same seeds."""

    sampler: SamplerConfig
    scores: Mapping[str, Sequence[Mapping[str, float]]]

    def as_dict(self) -> dict[str, Any]:
        """The sampler with the scores."""
        return {"sampler": sampler_summary(self.sampler, VELOCITY), **self._entries()}


@dataclass(frozen=True)
class Comparison(_Table):
    """Scores of the four models on the same fresh seeds."""

    num_images: int
    best_single: str  # name of the checkpoint
    scores: Mapping[str, Sequence[Mapping[str, float]]]
    # Under an SDE where the rewards were made by the ODE of a velocity network: gains under one
    # need not carry over to the other.
    sde: SamplerComparison | None = None
    second: SecondScores | None = None  # of start and result alone
    # Of the reference and the held-out data, real images both: what no model can go below by much.
    floor: float | None = None
    # Of those without a finite score: how many images failed, and whose doing it is.
    failures: Mapping[str, str] = field(default_factory=dict)
    keep_worse: bool = False

    @property
    def written(self) -> str:
        """Which entry becomes the merged model: "result", or the "start" that it is worse than.

        Worse is a paired interval below 0, or a result without a score where the start has one.
        """
        lost = "result" in self.failures and "start" not in self.failures
        worse = lost or self.gain("start").high < 0
        return "start" if worse and not self.keep_worse else "result"

    @property
    def warnings(self) -> list[str]:
        """Sentences for what is to be doubted.

        Scores that failed, a result that is not written, and a gain by what was optimised that
        other scores do not share.
        """
        texts = [f"no score of the {entry}: {why}" for entry, why in self.failures.items()]
        if self.written == "start":
            lost = "has no score" if "result" in self.failures else "is worse than its start"
            texts.append(f"the result {lost}: the start is written in its place (--keep-worse)")
        return texts + self._doubts()

    def _doubts(self) -> list[str]:
        gained = self.gain("start", "reference")
        if not gained.low > 0:
            return []
        others = [("held-out FID", self.gain("start", "heldout"))] if self._held_out else []
        if self.second is not None:
            others.append((f"{metric_text(self.second.name)} to the reference", self.second.gain()))
        return [
            f"FID to the reference improved by {interval(gained, '+.4g')}, but {what} did not, "
            f"{interval(gain, '+.4g')}: the gain may be one of what was optimised alone"
            for what, gain in others
            if not gain.low > 0
        ]

    @property
    def _held_out(self) -> bool:
        return "heldout" in self.references

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with None for what could not be scored."""
        document: dict[str, Any] = {
            "metric": "fid",
            "num_images": self.num_images,
            "repeats": len(self.scores["result"]),
            "headline": self.headline,
            "best_single": self.best_single,
            "written": self.written,
            **({"failures": dict(self.failures)} if self.failures else {}),
            **self._entries(),
        }
        if self.sde is not None:
            document["sde"] = self.sde.as_dict()
        if self.second is not None:
            document["second"] = self.second.as_dict()
        if self.floor is not None:
            document["floor"] = self.floor
        return {key: without_nan(value) for key, value in document.items()}


def comparison_from(values: Mapping[str, Any]) -> Comparison:
    """The comparison whose fields `dataclasses.asdict` gave."""
    sde = values["sde"]
    if sde is not None:
        sde = SamplerComparison(from_mapping(SamplerConfig, sde["sampler"]), sde["scores"])
    second = values["second"]
    second = SecondScores(**second) if second is not None else None
    return Comparison(**{**values, "sde": sde, "second": second})


def compare(
    config: OptimizeConfig,
    job: Job,
    start: Tensor,
    coefficients: Tensor,
    scores: ScoreStore,
    tracker: Tracker,
) -> Comparison:
    """Score the four on seeds that nothing was chosen by; finished scores are not repeated.

    The best single checkpoint is found first, on seeds of its own: choosing and reporting on the
    same seeds would flatter it.
    """
    settings = config.evaluation
    job.final_rollout.rollout.on_images = tracker.advance
    best = _best_single(config, job, scores, tracker)
    entries = {
        "start": start,
        "uniform": job.coefficients(None),
        "best single": job.coefficients(best),
        "result": coefficients,
    }
    tracker.phase("compare", len(entries) * settings.repeats * settings.images)
    table = _repeats(settings, entries, scores, with_second=("start", "result"))
    sde = _compare_sde(config, job, entries, scores, tracker)
    opinion = _second_opinion(settings, scores)
    floor = scores.scorer.floor({name: ref.stats for name, ref in job.references.items()})
    extractor = job.final_rollout.rollout.extractor.name
    failures = {
        entry: found.said(extractor) for entry in entries if (found := scores.failures(f"{entry}/"))
    }
    if failures.keys() >= {"start", "result"} and not settings.keep_worse:
        why = failures["result"]
        raise StatisticsError(f"no score of the start or of the result, none is written: {why}")
    return Comparison(
        settings.images, job.checkpoints.names[best], table, sde, opinion, floor, failures,
        settings.keep_worse,
    )  # fmt: skip


def _best_single(config: OptimizeConfig, job: Job, scores: ScoreStore, tracker: Tracker) -> int:
    count, images = len(job.checkpoints), config.evaluation.selection
    tracker.phase("best single", count * images)
    singles = [
        Request(f"select/{name}", job.coefficients(i), images, ("select",))
        for i, name in enumerate(job.checkpoints.names)
    ]
    found = [score["reference"] for score in scores.get_all(singles)]
    return min(range(count), key=lambda i: (math.isnan(found[i]), found[i], i))


def _compare_sde(
    config: OptimizeConfig,
    job: Job,
    entries: Mapping[str, Tensor],
    scores: ScoreStore,
    tracker: Tracker,
) -> SamplerComparison | None:
    """Start and result under the SDE, for networks whose public scores come from either sampler."""
    settings, rollout = config.evaluation, job.final_rollout.rollout
    if prediction_of(rollout.model) != VELOCITY or rollout.sampler.is_sde:
        return None
    sampler = sde_counterpart(rollout.sampler)
    merged = job.final_rollout.with_sampler(sampler)
    compared = ("start", "result")
    tracker.phase("compare under the SDE", len(compared) * settings.repeats * settings.images)
    table = _repeats(settings, {e: entries[e] for e in compared}, scores, "sde/", merged)
    return SamplerComparison(sampler, table)


def _second_opinion(settings: EvaluationConfig, scores: ScoreStore) -> SecondScores:
    """The second metric of start and result."""
    repeats = range(settings.repeats)
    found = {e: [scores.second(f"{e}/{r}") for r in repeats] for e in ("start", "result")}
    return SecondScores(scores.second_metric.name, found)


def _repeats(
    settings: EvaluationConfig,
    entries: Mapping[str, Tensor],
    scores: ScoreStore,
    prefix: str = "",
    merged: MergedRollout | None = None,
    with_second: Sequence[str] = (),
) -> dict[str, list[dict[str, float]]]:
    """Scores of every entry on the same fresh seeds, repeat by repeat."""
    repeats = range(settings.repeats)
    asked = [
        Request(
            f"{prefix}{entry}/{r}",
            coefficients,
            settings.images,
            ("fresh", r),
            second=entry in with_second,
        )
        for entry, coefficients in entries.items()
        for r in repeats
    ]
    found = scores.get_all(asked, merged)
    return {
        entry: found[i * len(repeats) : (i + 1) * len(repeats)] for i, entry in enumerate(entries)
    }


@dataclass(frozen=True)
class SecondScores:
    """The second metric of start and result, repeat by repeat on the same seeds."""

    name: str
    scores: Mapping[str, Sequence[float]]  # "start", "result"

    def gain(self) -> Interval:
        """Paired interval of (start - result): above 0 the result is better."""
        pairs = zip(self.scores["start"], self.scores["result"], strict=True)
        return mean_interval([start - result for start, result in pairs])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        gain = self.gain()
        entries = {}
        for entry, values in self.scores.items():
            mean = mean_interval(values)
            entries[entry] = {
                "mean": mean.mean, "low": mean.low, "high": mean.high, "values": list(values),
            }  # fmt: skip
        return {
            "metric": self.name,
            "entries": entries,
            "gain_over_start": {"mean": gain.mean, "low": gain.low, "high": gain.high},
        }
