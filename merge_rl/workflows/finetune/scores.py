"""Scores of a fine-tuning run: four curves along the way, start against result at the end.

Under ODE and SDE, each with the steps of training and with those of evaluation: gains under one of
the four need not carry over to the others (arXiv:2607.02291, section 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from torch import Tensor, nn

from merge_rl.config import CURVES, FinetuneConfig, without_nan
from merge_rl.core.distances.intervals import improvement, summarize
from merge_rl.core.sampling.compatibility import balanced_labels, on_path, prediction_of
from merge_rl.errors import NonFiniteSamplesError, StatisticsError
from merge_rl.interfaces import Tracker
from merge_rl.rng import image_seeds
from merge_rl.storage.files import enlarge, image_grid, write_png
from merge_rl.storage.runs import CURVES_FILE, FinetuneRun, fitting
from merge_rl.workflows.evaluate import Scorer, sampler_summary
from merge_rl.workflows.finetune.job import FinetuneJob
from merge_rl.workflows.rollout import Failures, Rollout

Point = Mapping[str, Mapping[str, float | None]]
"""curve -> reference -> FID; None where a sample was not finite."""
Make = Callable[[Rollout, Sequence[int], Tensor, str], Tensor]
"""Features (N, D) of images: of a rollout, seeds, labels and a phase for messages."""
GRID_IMAGES: Final = 100


class Curves:
    """Points of the four curves, each written to the run as soon as it is known."""

    def __init__(self, job: FinetuneJob, run: FinetuneRun) -> None:
        self.job, self.run, self.config = job, run, job.config
        self.points: dict[int, Point] = dict(run.curves())
        with fitting(run.path / CURVES_FILE, "curves"):
            for curve in CURVES:
                self.values(curve)  # of the references that the run has
        self.scorer = Scorer({name: ref.stats for name, ref in job.references.items()})

    def forget_after(self, step: int) -> None:
        """Drop the points of steps that will be done again."""
        self.points = {k: v for k, v in self.points.items() if k <= step}
        self._write()

    def make_point(self, network: nn.Module, make: Make, step: int, tracker: Tracker) -> Point:
        """Score the network of a step by features that `make` makes; all points have equal seeds.

        Whose doing it is where one has no score, the tracker hears.
        """
        rollout = self.job.scored.with_network(network)
        rollout.on_images = tracker.advance
        count, seed = self.config.curves.num_images, self.config.seed
        seeds = image_seeds(count, seed, "curve", rules=self.config.rules)
        labels = balanced_labels(count, self.job.num_classes)
        point: dict[str, dict[str, float | None]] = {}
        for name, sampler in self.config.curve_samplers().items():
            features = make(rollout.with_sampler(sampler), seeds, labels, f"curve {name}")
            if failures := Failures.of(features):
                said = failures.said(rollout.extractor.name)
                _warn(tracker, f"no score of step {step} under {name}: {said}")
            point[name] = without_nan(self.scorer.score(features))
        return point

    def add(self, step: int, point: Point) -> None:
        """Keep the point of a step."""
        self.points = {**self.points, step: point}
        self._write()

    @property
    def headline(self) -> str:
        """The reference to judge by: held-out data where there is some."""
        return "heldout" if "heldout" in self.job.references else "reference"

    def values(self, curve: str) -> dict[int, float]:
        """step -> FID of a curve, infinite where it could not be scored."""
        found = {}
        for step in sorted(self.points):
            value = self.points[step][curve][self.headline]
            found[step] = math.inf if value is None else value
        return found

    def best_step(self) -> int | None:
        """The step whose point is lowest on the curve that the user named; None if none is."""
        if self.config.curves.stop_on is None or not self.points:
            return None
        values = self.values(self.config.curves.stop_on)
        return min(values, key=lambda step: (values[step], step))

    def ended(self) -> bool:
        """Whether the named curve has gone `patience` points without a better one."""
        best = self.best_step()
        if best is None:
            return False
        return len([step for step in self.points if step > best]) >= self.config.curves.patience

    def _write(self) -> None:
        document = {str(step): self.points[step] for step in sorted(self.points)}
        self.run.write(CURVES_FILE, document)


def write_grid(job: FinetuneJob, run: FinetuneRun, step: int, network: nn.Module) -> str | None:
    """samples/step-N.png of the same seeds at every step, under the SDE of evaluation.

    None for samples that are no pictures, and where a sample is not finite: a grid of some of the
    images would look sound.
    """
    if not job.parts.makes_images:
        return None
    rollout: Rollout = job.scored.with_network(network)
    rollout = rollout.with_sampler(job.config.curve_samplers()["sde-eval"])
    rollout.on_images = lambda _count: None
    seeds = image_seeds(GRID_IMAGES, job.config.seed, "grid", rules=job.config.rules)
    noise = rollout.noise(seeds)
    labels = balanced_labels(GRID_IMAGES, job.num_classes)
    try:
        images = rollout.images(noise, labels)
    except NonFiniteSamplesError:
        return None
    grid = image_grid(images, 10)
    path = run.path / "samples" / f"step-{step:07d}.png"
    write_png(path, enlarge(grid, max(1, 480 // grid.shape[-1])))
    return str(path)


def final_scores(
    job: FinetuneJob,
    run: FinetuneRun,
    networks: Mapping[str, nn.Module],
    step: int,
    tracker: Tracker,
    make: Make,
) -> dict[str, Any]:
    """Start and result, the weights of `step`, on the same fresh seeds, under all four samplers.

    Seeds of their own, which nothing was chosen by. `make` makes the features. Each score is kept
    as soon as it is known. StatisticsError where the extractor's features are not finite: what it
    does with some of the images says nothing of the weights.
    Returns {"num_images", "repeats", "headline", "curves": {curve: {"sampler", "entries":
    {entry: summary}, "gain": {"mean", "low", "high"}}}}; the gain is start - result, paired.
    """
    settings, seed = job.config.curves, job.config.seed
    scorer = Scorer({name: ref.stats for name, ref in job.references.items()})
    known = run.scores(job.references)
    labels = balanced_labels(settings.final_images, job.num_classes)
    total = len(networks) * len(CURVES) * settings.repeats
    tracker.phase("final comparison", total * settings.final_images)
    scores: dict[str, dict[str, list[Mapping[str, float]]]] = {curve: {} for curve in CURVES}
    for entry, network in networks.items():
        rollout = job.scored.with_network(network)
        rollout.on_images = tracker.advance
        for curve, sampler in job.config.curve_samplers().items():
            for repeat in range(settings.repeats):
                # A run may end, go further and end again, with another result.
                key = f"{entry}-{step if entry == 'result' else 0}/{curve}/{repeat}"
                if key not in known:
                    seeds = image_seeds(
                        settings.final_images, seed, "final", repeat, rules=job.config.rules
                    )
                    features = make(rollout.with_sampler(sampler), seeds, labels, key)
                    if failures := Failures.of(features):
                        said = failures.said(rollout.extractor.name)
                        text = f"no score of the {entry} under {curve}: {said}"
                        if failures.features:
                            raise StatisticsError(f"{run.path}: {text}; go on with mergerl resume")
                        _warn(tracker, text)
                    known[key] = without_nan(scorer.score(features))
                    run.write("scores.json", known)
                else:
                    tracker.advance(settings.final_images)
                found = {k: math.nan if v is None else v for k, v in known[key].items()}
                scores[curve].setdefault(entry, []).append(found)
    return _document(job, job.config, scores)


def _warn(tracker: Tracker, text: str) -> None:
    tracker.event({"kind": "warning", "text": text})


def _document(
    job: FinetuneJob,
    config: FinetuneConfig,
    scores: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]],
) -> dict[str, Any]:
    headline = "heldout" if "heldout" in job.references else "reference"
    curves = {}
    for curve, sampler in config.curve_samplers().items():
        found = scores[curve]
        gain = improvement(found["result"], found["start"], headline)
        curves[curve] = {
            "sampler": sampler_summary(on_path(sampler, job.network), prediction_of(job.network)),
            "entries": {entry: summarize(rows) for entry, rows in found.items()},
            "gain": {"mean": gain.mean, "low": gain.low, "high": gain.high},
        }
    document = {
        "metric": "fid",
        "num_images": config.curves.final_images,
        "repeats": config.curves.repeats,
        "headline": headline,
        "curves": curves,
    }
    cleaned: dict[str, Any] = without_nan(document)
    return cleaned
