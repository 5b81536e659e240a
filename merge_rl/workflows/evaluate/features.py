"""Features of images that a network generates from fresh seeds, in pieces that can be kept."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from merge_rl.config import SamplerConfig, sde_counterpart
from merge_rl.core.sampling.compatibility import DENOISED, VELOCITY, balanced_labels, prediction_of
from merge_rl.errors import (
    NonFiniteSamplesError,
    StatisticsError,
    TooFewSamplesError,
    UnknownNameError,
)
from merge_rl.interfaces import FeatureExtractor, Tracker
from merge_rl.rng import stream
from merge_rl.storage.files import WorkFolder, open_images
from merge_rl.workflows.reference import (
    CollectPlan,
    FeatureStore,
    collect,
    kept_features,
    source_notes,
)
from merge_rl.workflows.rollout import (
    Failures,
    MergedRollout,
    Rollout,
    WorkItem,
    matmul_precision,
)

PIECE_ROWS: Final = 1000  # images whose noise is held, and whose features are written, at once


def block_features(
    made: MergedRollout,
    seeds: Sequence[int],
    *,
    name: str,
    store: FeatureStore | None = None,
) -> Tensor:
    """Features (N, D) of the images of N seeds, labels balanced.

    With a store, finished pieces are kept under the name and not made again. NonFiniteSamplesError,
    with the seed and the step, where a sample is not finite: never a score of the others.
    """
    count, rollout = len(seeds), made.rollout
    labels = balanced_labels(count, int(getattr(rollout.model, "label_dim", 0)))
    key = {"sampler": sampler_summary(rollout.sampler, prediction_of(rollout.model))}
    if store is not None:
        done = store.load(name, key)
        if done is not None:
            rollout.on_images(count)
            return done
    work = store.pieces(name, key) if store is not None else None
    spans = [slice(start, min(start + PIECE_ROWS, count)) for start in range(0, count, PIECE_ROWS)]
    parts = {span.start: _kept(work, span) for span in spans}
    missing = [span for span in spans if parts[span.start] is None]
    rollout.on_images(count - sum(span.stop - span.start for span in missing))
    # One piece at a time, to lose little; as many as give every process a batch if there are more.
    step = max(1, made.processes * rollout.batch // PIECE_ROWS) if made.processes > 1 else 1
    for first in range(0, len(missing), step):
        chosen = missing[first : first + step]
        for span, features in zip(chosen, _pieces(made, seeds, labels, chosen), strict=True):
            parts[span.start] = features
            if work is not None and span.stop < count:
                work.write(_piece_name(span), {"features": features}, {})
    features = torch.cat([part for part in parts.values() if part is not None])
    if store is not None:
        store.save(name, key, features, labels)
    return features


def _piece_name(span: slice) -> str:
    return f"features-{span.start:09d}"


def _kept(work: WorkFolder | None, span: slice) -> Tensor | None:
    """A piece that an earlier call finished."""
    found = work.read(_piece_name(span)) if work is not None else None
    if found is None or len(found[0]["features"]) != span.stop - span.start:
        return None
    return found[0]["features"]


def _pieces(
    made: MergedRollout, seeds: Sequence[int], labels: Tensor, spans: Sequence[slice]
) -> list[Tensor]:
    items = [WorkItem(None, seeds[s], labels[s]) for s in spans]
    found = made.features_of(items, f"images {spans[0].start} and on")
    for item, features in zip(items, found, strict=True):
        failures = Failures.of(features)
        if failures.features:
            said = failures.said(made.rollout.extractor.name)
            raise StatisticsError(f"no score from seed {item.seeds[0]}: {said}")
        if failures:
            row = int(features.isnan().all(1).nonzero()[0])
            noise = made.rollout.noise([item.seeds[row]])
            where = _failed_step(made.rollout, noise, item.labels[row : row + 1])
            raise NonFiniteSamplesError(
                "the model generates samples that are not finite: no score "
                f"(the image of seed {item.seeds[row]}{where})"
            )
    return found


def _failed_step(rollout: Rollout, noise: Tensor, label: Tensor) -> str:
    """The step at which an image ceases to be finite, for a message; it is generated again."""
    try:
        with matmul_precision(rollout.sampler):
            rollout.latents(noise, label, check_finite=True)
    except NonFiniteSamplesError as error:
        return f": {error}"
    return ""


def sampler_summary(sampler: SamplerConfig, prediction: str = DENOISED) -> dict[str, Any]:
    """The settings that a score depends on, for networks that predict `prediction`."""
    names = ["solver", "num_steps", "guidance"]
    names += ["sigma_min", "sigma_max", "rho"] if prediction == DENOISED else ["path"]
    if sampler.is_sde:
        names += ["diffusion", "diffusion_norm"]
        if prediction == VELOCITY:
            names += ["last_step", "last_step_size"]
    if sampler.is_adaptive:
        names += ["rtol", "atol"]
    if prediction == VELOCITY and sampler.guidance != 1 and sampler.guide is None:
        names.append("guidance_channels")
    if sampler.precision != "float32":
        names.append("precision")
    if sampler.guidance != 1 and sampler.guidance_interval is not None:
        names += ["guidance_interval", "guidance_ends"]
    return {name: getattr(sampler, name) for name in names}


class ImageFeatures(NamedTuple):
    """Features (N, D), why images were skipped, what else to know, the side of square images."""

    features: Tensor
    broken: list[str]
    notes: list[str]
    resolution: int | None = None


def image_features(
    images: str | os.PathLike[str],
    extractor: FeatureExtractor,
    *,
    batch: int,
    device: str,
    skip_broken: bool,
    store: FeatureStore | None,
    tracker: Tracker,
) -> ImageFeatures:
    """Features of all images of a source; finished ones are taken from the store."""
    source = open_images(images)
    notes = source_notes(source)
    name, key = "images", {"images": source.fingerprint, "skip_broken": skip_broken}
    tracker.phase("extract", len(source))
    if store is not None:
        done = store.load(name, key)
        if done is not None:
            tracker.advance(len(source))
            return ImageFeatures(done, [], notes)
    plan = CollectPlan(
        rows=torch.arange(len(source)),
        parts=torch.zeros(len(source), dtype=torch.int64),
        keep=torch.ones(len(source), dtype=torch.bool),
        num_parts=1,
        batch=batch,
    )
    work = store.pieces(name, {**key, "batch": batch}) if store is not None else None
    found = collect(
        source, plan, extractor, work,
        device=device, skip_broken=skip_broken, on_images=tracker.advance,
    )  # fmt: skip
    kept = kept_features(work, found)
    if kept is None:
        raise TooFewSamplesError(f"{images}: expected sound images, found none")
    if found.broken:
        text = f"{len(found.broken)} broken images skipped; first: {found.broken[0]}"
        tracker.event({"kind": "warning", "text": text})
    if store is not None:
        labels = None if source.labels is None else source.labels[kept[0]]
        store.save(name, key, kept[1], labels)
    kind = found.kind
    side = kind.width if kind is not None and kind.width == kind.height else None
    return ImageFeatures(kept[1], list(found.broken), notes, side)


def blocks_of(
    features: Tensor, num_images: int | None, repeats: int, seed: int, path: str | Path
) -> list[Tensor]:
    """Up to `repeats` disjoint blocks of `num_images` rows, drawn by the seed; all rows if None.

    Drawn, because a folder is often in the order of its classes.
    """
    if num_images is None:
        return [features]
    if len(features) < num_images:
        raise TooFewSamplesError(
            f"{path}: expected at least {num_images} images, as --num-images says, "
            f"found {len(features)}"
        )
    count = min(repeats, len(features) // num_images)
    order = torch.randperm(len(features), generator=stream(seed, "blocks"))
    starts = range(0, count * num_images, num_images)
    return [features[order[start : start + num_images].sort().values] for start in starts]


CHOICES: Final = ("ode", "sde", "both")


def samplers_of(
    model: object, settings: SamplerConfig | None = None, which: str | None = None
) -> dict[str, SamplerConfig]:
    """{"ode": ..., "sde": ...}, or one of them, from the settings of one.

    By default both for networks that predict velocities (SiT), whose papers report both; else the
    kind that the settings have. What the settings are not, ODE or SDE, is made of them: Heun with
    the same `num_steps`, Euler-Maruyama with `sde_num_steps`.
    """
    if which is not None and which not in CHOICES:
        raise UnknownNameError("sampler", which, CHOICES)
    base = settings or SamplerConfig()
    if which is None:
        own = "sde" if base.is_sde else "ode"
        which = "both" if prediction_of(model) == VELOCITY else own
    ode = dataclasses.replace(base, solver="heun") if base.is_sde else base
    named = {"ode": ode, "sde": sde_counterpart(base)}
    return named if which == "both" else {which: named[which]}
