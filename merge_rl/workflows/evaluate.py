"""Scores of one model: repeats over disjoint blocks of seeds, with an interval."""

from __future__ import annotations

from typing import Any

from merge_rl.config import SamplerConfig
from merge_rl.core.statistics import FeatureStats
from merge_rl.errors import NonFiniteWeightsError
from merge_rl.interfaces import NullTracker, Tracker
from merge_rl.workflows.rollout import Rollout, balanced_labels
from merge_rl.workflows.scoring import Scorer, summarize


def evaluate_rollout(
    rollout: Rollout,
    references: dict[str, FeatureStats],
    *,
    num_images: int,
    repeats: int,
    num_classes: int,
    seed: int = 0,
    tracker: Tracker | None = None,
) -> dict[str, Any]:
    """FID to each reference from `repeats` disjoint blocks of `num_images` image seeds.

    Block r holds the seeds seed + r N ... seed + (r + 1) N - 1; labels are balanced. Returns
    {"num_images", "repeats", "sampler", "fid": {reference: mean, low, high, min, values}}.
    """
    tracker = tracker or NullTracker()
    tracker.phase("evaluate", num_images * repeats)
    rollout.on_images = tracker.advance
    scorer, scores = Scorer(references), []
    labels = balanced_labels(num_images, num_classes)
    for repeat in range(repeats):
        first = seed + repeat * num_images
        features = rollout.features(rollout.noise(range(first, first + num_images)), labels)
        if not bool(features.isfinite().all()):
            raise NonFiniteWeightsError("the model generates samples that are not finite: no score")
        scores.append(scorer.score(features))
    return {
        "num_images": num_images,
        "repeats": repeats,
        "first_seed": seed,
        "sampler": sampler_summary(rollout.sampler),
        "fid": summarize(scores),
    }


def sampler_summary(sampler: SamplerConfig) -> dict[str, Any]:
    """The settings that a score depends on."""
    return {
        "solver": sampler.solver,
        "num_steps": sampler.num_steps,
        "sigma_min": sampler.sigma_min,
        "sigma_max": sampler.sigma_max,
        "rho": sampler.rho,
        "guidance": sampler.guidance,
    }
