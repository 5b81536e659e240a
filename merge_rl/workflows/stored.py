"""Features of images that exist already, or features themselves, split into blocks to score."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from merge_rl.errors import TooFewSamplesError
from merge_rl.interfaces import FeatureExtractor, Tracker
from merge_rl.rng import stream
from merge_rl.storage.image_source import open_images
from merge_rl.workflows.collecting import Plan, collect, kept_features
from merge_rl.workflows.feature_store import FeatureStore


def image_features(
    images: str | os.PathLike[str],
    extractor: FeatureExtractor,
    *,
    batch: int,
    device: str,
    skip_broken: bool,
    store: FeatureStore | None,
    tracker: Tracker,
) -> tuple[Tensor, list[str]]:
    """Features (N, D) of all images of a source, and the reasons of those that were skipped."""
    source = open_images(images)
    name, key = "images", {"images": source.fingerprint, "skip_broken": skip_broken}
    tracker.phase("extract", len(source))
    if store is not None:
        done = store.load(name, key)
        if done is not None:
            tracker.advance(len(source))
            return done, []
    plan = Plan(
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
    return kept[1], list(found.broken)


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
