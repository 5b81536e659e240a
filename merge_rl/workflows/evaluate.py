"""Scores of one model: repeats over disjoint blocks of seeds, with an interval."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from merge_rl import registry
from merge_rl.config import SamplerConfig
from merge_rl.core.statistics import FeatureStats
from merge_rl.errors import NonFiniteWeightsError, TooFewSamplesError, UnknownNameError
from merge_rl.interfaces import Autoencoder, FeatureExtractor, NullTracker, Tracker
from merge_rl.storage.reference import Reference, load_reference
from merge_rl.workflows.assemble import cpu_workers, load_guide
from merge_rl.workflows.rollout import Rollout, balanced_labels
from merge_rl.workflows.scoring import Scorer, summarize

METRICS: Final = ("fid",)


def evaluate(
    model: nn.Module,
    *,
    reference: Reference | FeatureStats | str | os.PathLike[str],
    extractor: FeatureExtractor,
    heldout: Reference | FeatureStats | str | os.PathLike[str] | None = None,
    metrics: Sequence[str] = ("fid",),
    num_images: int = 50_000,
    repeats: int = 3,
    sampler: SamplerConfig | None = None,
    autoencoder: Autoencoder | None = None,
    batch: int = 250,
    device: str = "cpu",
    seed: int = 0,
    tracker: Tracker | None = None,
) -> dict[str, Any]:
    """Distances of a network's images to reference statistics, with intervals.

    Args:
        model: network with `sample_shape` and `label_dim`, as `load_model` gives.
        reference, heldout: statistics, or files of them.
        extractor: what made the statistics' features.
        metrics: "fid".
        num_images: N of one repeat; FID is biased upward at small N, compare equal N only.
        repeats: at least 2; each has a block of seeds of its own.
        sampler: solver settings; the defaults of `SamplerConfig` if None.
        autoencoder: from samples to images; pixel models need none.
        batch, device: bounds memory, says where to work.
        seed: first image seed.
        tracker: hears of progress.

    Returns what `evaluate_rollout` describes.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise UnknownNameError("metric", metric, METRICS)
    if num_images < 2:
        raise TooFewSamplesError(f"FID needs at least 2 images, got {num_images}")
    if repeats < 2:
        raise TooFewSamplesError(f"an interval needs at least 2 repeats, got {repeats}")
    named = {"reference": reference, "heldout": heldout}
    stats = {name: _stats(given, extractor) for name, given in named.items() if given is not None}
    if isinstance(extractor, nn.Module):
        extractor.to(device)
    rollout = network_rollout(
        model,
        sampler or SamplerConfig(),
        batch,
        device,
        extractor=extractor,
        autoencoder=autoencoder,
    )
    classes = int(getattr(model, "label_dim", 0))
    return evaluate_rollout(
        rollout, stats, num_images=num_images, repeats=repeats, num_classes=classes, seed=seed,
        tracker=tracker,
    )  # fmt: skip


def network_rollout(
    model: nn.Module,
    sampler: SamplerConfig,
    batch: int,
    device: str,
    *,
    extractor: FeatureExtractor | None = None,
    autoencoder: Autoencoder | None = None,
    on_images: Callable[[int], None] | None = None,
) -> Rollout:
    """A rollout of one network with its guide; without an extractor it is for images alone."""
    return Rollout(
        model.to(device),
        model.sample_shape,  # type: ignore[arg-type]
        sampler=sampler,
        autoencoder=autoencoder or registry.build_autoencoder(),
        extractor=extractor or _NoFeatures(),
        batch=batch,
        device=device,
        workers=cpu_workers(device),
        guide=load_guide(sampler, device),
        on_images=on_images,
    )


class _NoFeatures:
    """Stands where an extractor would, for images alone."""

    name, dim = "none", 0

    def __call__(self, images: Tensor) -> Tensor:
        """(B, ...) -> (B, 0)."""
        return images.new_zeros(len(images), 0)


def _stats(
    given: Reference | FeatureStats | str | os.PathLike[str], extractor: FeatureExtractor
) -> FeatureStats:
    if isinstance(given, FeatureStats):
        return given
    loaded = given if isinstance(given, Reference) else load_reference(given)
    loaded.require_extractor(extractor.name, None, Path(str(given)))
    return loaded.stats


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
