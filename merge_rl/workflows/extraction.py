"""Features of stored images, batch by batch, and which of the images to take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from merge_rl.errors import ConfigError, ImageError, StatisticsError, TooFewSamplesError
from merge_rl.interfaces import FeatureExtractor
from merge_rl.rng import stream
from merge_rl.storage.image_source import ImageSource, ImageStream
from merge_rl.workflows.fast import exact_products
from merge_rl.workflows.pool import draw_subset


def extract_features(
    images: ImageStream,
    rows: Sequence[int],
    extractor: FeatureExtractor,
    *,
    batch: int,
    device: str,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows (B,), features (B, D) float32 on the device) of each `batch` of the ascending rows.

    Broken images, where the stream skips them, have no row.
    """
    for found, pixels in images.batches(rows, batch):
        if len(found) == 0:
            yield found, torch.empty(0, extractor.dim, device=device)
            continue
        yield found, _features(extractor, pixels.to(device))


def _features(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    try:
        with torch.no_grad(), exact_products():
            return extractor(images).float()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise StatisticsError(
            f"the extractor {extractor.name!r} does not take images of shape "
            f"{tuple(images.shape[1:])}: {reason}"
        ) from None


def choose_rows(source: ImageSource, limit: int | None, *, balanced: bool, seed: int) -> Tensor:
    """Ascending rows (N,) of at most `limit` images of a source, drawn by the seed.

    Where the labels are known, classes keep their shares; with `balanced` each class gives the
    same number, within one. Raises ImageError if that is asked of images without labels.
    """
    count, labels = len(source), source.labels
    if limit is not None and limit < 2:
        raise ConfigError(f"expected a limit of at least 2 images, got {limit}")
    if balanced and labels is None:
        raise ImageError(
            f"{source.path}: class-balanced subsets need labels; expected a dataset.json with "
            '"labels" beside the images, or an array "labels" in their file'
        )
    generator = stream(seed, "images")
    if balanced and labels is not None:
        return _balanced_rows(labels, count if limit is None else limit, generator)
    if limit is None or limit >= count:
        return torch.arange(count)
    classes = torch.zeros(count, dtype=torch.int64) if labels is None else labels
    return draw_subset(classes, limit, generator)


def split_rows(source: ImageSource, rows: Tensor, seed: int) -> Tensor:
    """Which half each row falls in, (N,) bool, drawn by the seed; classes keep their shares."""
    labels = torch.zeros(len(rows), dtype=torch.int64)
    if source.labels is not None:
        labels = source.labels[rows]
    second = torch.zeros(len(rows), dtype=torch.bool)
    second[draw_subset(labels, len(rows) // 2, stream(seed, "halves"))] = True
    return second


def _balanced_rows(labels: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    sizes = Counter(labels.tolist())
    each = min(limit // len(sizes), *sizes.values())
    if each == 0:
        raise TooFewSamplesError(
            f"expected a balanced subset of at least {len(sizes)} images, one of each class, "
            f"got a limit of {limit}"
        )
    picked = []
    for label in sorted(sizes):
        of_class = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(of_class), generator=generator)
        picked.append(of_class[order[:each]])
    return torch.cat(picked).sort().values
