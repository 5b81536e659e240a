"""References and the extractor of an evaluation, brought together or refused."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from merge_rl import registry
from merge_rl.config import MOST_FINAL, MOST_SELECTION, EvaluationConfig, OptimizeConfig
from merge_rl.core.distances.statistics import FeatureStats
from merge_rl.core.sampling.compatibility import VELOCITY, prediction_of
from merge_rl.errors import BudgetError, ConfigError
from merge_rl.interfaces import FeatureExtractor
from merge_rl.own_code import is_own
from merge_rl.storage.checkpoints import CheckpointSet
from merge_rl.workflows.assembly.extractors import (
    DIMS,
    build_extractor,
    encoders,
    named_by_file,
    weights_by_name,
    weights_source,
)
from merge_rl.workflows.assembly.published import PUBLIC_FILES, is_public
from merge_rl.workflows.reference import (
    Reference,
    SavedFeatures,
    few_images,
    load_all_references,
    load_reference,
)
from merge_rl.workflows.rollout import Rollout

LEAST_FINAL, SELECTION_PARTS = 10, 6  # images of a score; part of the comparison that selects
COMPARED, COMPARED_SDE, PICTURES = 4, 2, 60  # models of the final comparison; images to look at


def resolve_evaluation(config: OptimizeConfig, checkpoints: CheckpointSet) -> EvaluationConfig:
    """The final comparison with N: as it is said, or what its share of the budget pays for.

    Raises BudgetError where that is too little to tell models apart.
    """
    found, count = config.evaluation, len(checkpoints)
    if found.reserved:
        return found
    if found.num_images is not None:
        return with_selection(found, count)
    total = int(found.share * config.budget)
    few = min(MOST_SELECTION, max(LEAST_FINAL, total // (SELECTION_PARTS * count)))
    selection = found.selection_images or few
    looks = found.repeats * (COMPARED + (COMPARED_SDE if _scored_by_sde(checkpoints) else 0))
    images = min(MOST_FINAL, (total - PICTURES - count * selection) // looks)
    if images < LEAST_FINAL:
        least = PICTURES + count * (found.selection_images or LEAST_FINAL) + looks * LEAST_FINAL
        raise BudgetError(
            f"a budget of {config.budget} images leaves {max(0, images)} for a repeat of the final "
            f"comparison, expected at least {LEAST_FINAL}: a budget of "
            f"{math.ceil(least / found.share)}, or --final-images N, which come on top of it"
        )
    reserved = PICTURES + count * selection + looks * images
    return dataclasses.replace(
        found, num_images=images, selection_images=selection, reserved=reserved
    )


def with_selection(found: EvaluationConfig, count: int) -> EvaluationConfig:
    """A comparison of N images with those that the best of `count` checkpoints is found by.

    Where nothing is said, all checkpoints together cost as much as one model of the comparison.
    """
    each = max(LEAST_FINAL, min(MOST_SELECTION, found.repeats * found.images // count))
    return dataclasses.replace(found, selection_images=found.selection_images or each)


def _scored_by_sde(checkpoints: CheckpointSet) -> bool:
    """Whether start and result are compared under an SDE too."""
    if checkpoints.config is None:
        return False
    return prediction_of(registry.build_on_meta(checkpoints.config)) == VELOCITY


Statistics = Reference | FeatureStats | str | os.PathLike[str]


class ExtractorId(NamedTuple):
    """What made features: the extractor's name, "" if unknown, its weights' hash, its dimension."""

    name: str
    sha256: str | None
    dim: int


def expected_extractor(name: str, weights: str | None) -> ExtractorId | None:
    """What an extractor is known to be before its weights are; None for a module of the user's.

    The hash is that of pinned public weights. Raises as `build_extractor` does for names.
    """
    if len(several := encoders(name)) > 1:
        given = weights_by_name(name, weights)
        found = [expected_extractor(one, given.get(one)) for one in several]
        dims = [one.dim for one in found if one is not None]
        return ExtractorId(name, None, sum(dims)) if len(dims) == len(found) else None
    source = weights_source(name, weights)
    if is_own(name):
        return None
    pinned = PUBLIC_FILES[source].sha256 if source and is_public(source) else None
    return ExtractorId(name, pinned, DIMS[name])


Opened = Mapping[tuple[str, str], Reference]
"""Statistics that have been read, by the extractor they are compared with and their path."""


def open_comparable(
    name: str, weights: str | None, statistics: Iterable[str | None]
) -> dict[tuple[str, str], Reference]:
    """Statistics, read before weights are read or fetched; raises for those of another extractor.

    A module of the user's is known when it is called: for it the files are read, no more.
    """
    maker = expected_extractor(name, weights)
    paths = [path for path in statistics if path is not None]
    if maker is not None:
        found = find_references(dict(zip(paths, paths, strict=True)), maker)
        return {(name, path): reference for path, (reference, _) in found.items()}
    for path in paths:
        load_all_references(path)
    return {}


def fit_reference(
    path: str, extractor: FeatureExtractor, digest: str | None, named: str, opened: Opened
) -> Reference:
    """Statistics that have been read, or are now, held against the extractor `named` as built."""
    known = opened.get((named, path))
    if known is None:
        return load_reference(path, extractor=extractor.name, sha256=digest, dim=extractor.dim)
    known.require_extractor(extractor.name, digest, path, extractor.dim)
    return known


def name_extractor(
    extractor: FeatureExtractor | str | None, reference: Statistics
) -> FeatureExtractor | str:
    """The extractor as given, else the name that the reference says."""
    if extractor is not None:
        return extractor
    named = "" if isinstance(reference, FeatureStats) else _open(reference).extractor
    if not named:
        raise ConfigError("the reference does not name its extractor; say which one to use")
    return named_by_file(named, "the reference")


def find_extractor(
    extractor: FeatureExtractor | str, weights: str | None, sha256: str | None, device: str
) -> tuple[FeatureExtractor, ExtractorId]:
    """The extractor on a device: the object given, or built by name."""
    if isinstance(extractor, str):
        built, digest = build_extractor(extractor, weights, device)
        return built, ExtractorId(built.name, digest, built.dim)
    if isinstance(extractor, nn.Module):
        extractor.to(device)
    return extractor, ExtractorId(extractor.name, sha256, extractor.dim)


def extractor_of(saved: SavedFeatures, extractor: FeatureExtractor | str | None) -> ExtractorId:
    """What made saved features: what their file says, else the extractor that the caller names."""
    named = "" if extractor is None else extractor if isinstance(extractor, str) else extractor.name
    return ExtractorId(saved.extractor or named, saved.extractor_sha256, saved.features.shape[1])


def find_references(
    given: Mapping[str, Statistics | None], maker: ExtractorId
) -> dict[str, tuple[Reference, str]]:
    """Name -> (statistics, what messages call them), each fit to compare the maker's features with.

    Features of an unknown maker are compared with statistics of the same dimension.
    """
    found = {}
    for name, statistics in given.items():
        if statistics is None:
            continue
        path = name if isinstance(statistics, (Reference, FeatureStats)) else os.fspath(statistics)
        reference = _open(statistics, maker)
        reference.require_extractor(
            maker.name or reference.extractor, maker.sha256, path, maker.dim
        )
        found[name] = (reference, path)
    return found


def notes_of(references: Mapping[str, tuple[Reference, str]], maker: ExtractorId) -> list[str]:
    """What was assumed, a sentence each."""
    notes = [f"{path}: {found.assumed}" for found, path in references.values() if found.assumed]
    if not maker.name:
        notes.append("the features do not say which extractor made them")
    return notes


def image_size(shape: Sequence[int], decoder: object) -> int | None:
    """Side of the square images that samples (C, h, w) become; None where it is not known."""
    upscale = getattr(decoder, "upscale", None)
    return int(shape[-1]) * upscale if upscale and shape[-1] == shape[-2] else None


def other_resolutions(
    references: Mapping[str, tuple[Reference, str]], resolution: int | None
) -> list[str]:
    """A sentence for statistics that record another side of their images than `resolution`."""
    return [
        f"{path}: statistics of images of {found.resolution} x {found.resolution}, compared with "
        f"images of {resolution} x {resolution}"
        for found, path in references.values()
        if resolution and found.resolution and found.resolution != resolution
    ]


def search_doubts(
    config: OptimizeConfig, references: Mapping[str, Reference], rollout: Rollout
) -> list[str]:
    """What makes the scores of a search doubtful, a sentence each."""
    named = {name: (reference, name) for name, reference in references.items()}
    doubts = other_resolutions(named, image_size(rollout.shape, rollout.autoencoder))
    reward, dim = config.reward, rollout.extractor.dim
    if reward.pooled and "fid" in reward.text:
        doubts += [f"the pool has {text}" for text in few_images(reward.pool_size, dim)]
    return doubts


def _open(statistics: Statistics, maker: ExtractorId | None = None) -> Reference:
    if isinstance(statistics, FeatureStats):
        return Reference(stats=statistics)
    if isinstance(statistics, Reference):
        return statistics
    # The dimension tells which entry of a file with several is meant, the name as well.
    name, dim = (maker.name or None, maker.dim) if maker else (None, None)
    return load_reference(statistics, extractor=name, dim=dim)
