"""References and the extractor of an evaluation, brought together or refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from merge_rl.core.statistics import FeatureStats
from merge_rl.errors import ConfigError
from merge_rl.interfaces import FeatureExtractor
from merge_rl.storage.features_file import SavedFeatures
from merge_rl.storage.reference import Reference, load_reference
from merge_rl.workflows.extractors import build_extractor, named_by_file

Statistics = Reference | FeatureStats | str | os.PathLike[str]


class Maker(NamedTuple):
    """What made features: the extractor's name, "" if unknown, its weights' hash, its dimension."""

    name: str
    sha256: str | None
    dim: int


def find_extractor(
    extractor: FeatureExtractor | str | None,
    weights: str | None,
    sha256: str | None,
    reference: Statistics,
    device: str,
) -> tuple[FeatureExtractor, Maker]:
    """The extractor on a device: the object given, or built by name, or by the reference's name."""
    if extractor is None:
        extractor = "" if isinstance(reference, FeatureStats) else _open(reference).extractor
        if not extractor:
            raise ConfigError("the reference does not name its extractor; say which one to use")
        named_by_file(extractor, "the reference")
    if isinstance(extractor, str):
        built, digest = build_extractor(extractor, weights, device)
        return built, Maker(built.name, digest, built.dim)
    if isinstance(extractor, nn.Module):
        extractor.to(device)
    return extractor, Maker(extractor.name, sha256, extractor.dim)


def maker_of(saved: SavedFeatures, extractor: FeatureExtractor | str | None) -> Maker:
    """What made saved features: what their file says, else the extractor that the caller names."""
    named = "" if extractor is None else extractor if isinstance(extractor, str) else extractor.name
    return Maker(saved.extractor or named, saved.extractor_sha256, saved.features.shape[1])


def find_references(
    given: Mapping[str, Statistics | None], maker: Maker
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


def notes_of(references: Mapping[str, tuple[Reference, str]], maker: Maker) -> list[str]:
    """What was assumed, a sentence each."""
    notes = [f"{path}: {found.assumed}" for found, path in references.values() if found.assumed]
    if not maker.name:
        notes.append("the features do not say which extractor made them")
    return notes


def _open(statistics: Statistics, maker: Maker | None = None) -> Reference:
    if isinstance(statistics, FeatureStats):
        return Reference(stats=statistics)
    if isinstance(statistics, Reference):
        return statistics
    # The dimension tells which entry of a file with several is meant, the name as well.
    name, dim = (maker.name or None, maker.dim) if maker else (None, None)
    return load_reference(statistics, extractor=name, dim=dim)
