"""Features of stored images, extracted by several processes, used in order; samples of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from merge_rl.errors import StatisticsError
from merge_rl.interfaces import FeatureExtractor
from merge_rl.parallel.group import Group
from merge_rl.storage.files import ImageKind, ImageSource, ImageStream
from merge_rl.workflows.rollout import Failures, exact_products, is_out_of_memory


class SharedExtraction:
    """Batch b of some rows is made by process b mod W; process 0 gets all of them, in order.

    Batches are those of one process, so that neither features nor what is summed of them depend on
    the number of processes. `kind` and `broken` are what an `ImageStream` of all rows would have.
    """

    def __init__(
        self,
        group: Group,
        source: ImageSource,
        extractor: FeatureExtractor,
        *,
        batch: int,
        device: str,
        skip_broken: bool,
        kind: ImageKind | None = None,
        broken: Sequence[str] = (),
    ) -> None:
        self.group, self.source, self.extractor = group, source, extractor
        self.batch, self.device, self.skip_broken = batch, device, skip_broken
        self.kind, self.broken = kind, list(broken)

    def batches(self, rows: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows (B,), features (B, D) on the device) of every batch; on other processes none.

        All processes must go through it, with the same rows.
        """
        size, rank = self.group.size, self.group.rank
        if size == 1:
            yield from self._alone(rows)
            return
        starts = range(0, len(rows), self.batch)
        own = [row for s in starts[rank::size] for row in rows[s : s + self.batch]]
        nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, self.extractor.dim)
        with ImageStream(self.source, self.skip_broken) as images:
            made = extract_features(
                images, own, self.extractor, batch=self.batch, device=self.device
            )
            for turn in range(-(-len(starts) // size)):
                told, phase = len(images.broken), f"images, turn {turn}"
                self.group.note(phase)
                found, features = next(made, nothing)
                note = {
                    "rows": found.tolist(), "broken": images.broken[told:],
                    "kind": None if images.kind is None else dataclasses.asdict(images.kind),
                }  # fmt: skip
                yield from self._exchanged(note, features.cpu(), phase)

    def _alone(self, rows: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        with ImageStream(self.source, self.skip_broken, self.kind, self.broken) as images:
            for found in extract_features(
                images, rows, self.extractor, batch=self.batch, device=self.device
            ):
                self.kind = images.kind
                yield found

    def _exchanged(
        self, note: dict[str, Any], features: Tensor, phase: str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        notes = self.group.collect(note, phase=phase)
        padded = torch.zeros(self.batch, self.extractor.dim)
        padded[: len(features)] = features
        gathered = self.group.gather(padded, phase=phase)
        if notes is None or gathered is None:
            return
        for told, part in zip(notes, gathered, strict=True):
            self._take(told)
            if told["rows"] or told["broken"]:
                rows = torch.tensor(told["rows"], dtype=torch.int64)
                yield rows, part[: len(rows)].to(self.device)

    def _take(self, told: dict[str, Any]) -> None:
        self.broken += told["broken"]
        if told["kind"] is not None:
            self.kind = ImageKind(**told["kind"]).held_against(self.kind, self.source.path)


def extract_features(
    images: ImageStream,
    rows: Sequence[int],
    extractor: FeatureExtractor,
    *,
    batch: int,
    device: str,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows (B,), features (B, D) float32 on the device) of each `batch` of the ascending rows.

    Broken images, where the stream skips them, have no row. StatisticsError where the extractor
    refuses a batch, or gives features that are not finite, with the first such image.
    """
    for found, pixels in images.batches(rows, batch):
        if len(found) == 0:
            yield found, torch.empty(0, extractor.dim, device=device)
            continue
        features = _features(extractor, pixels.to(device))
        if not bool(features.isfinite().all()) and len(features) == len(found):
            failed = ~features.flatten(1).isfinite().all(1)
            first = images.source.name(int(found[failed.cpu()][0]))
            said = Failures(0, int(failed.sum()), len(found)).said(extractor.name)
            raise StatisticsError(f"{images.source.path}: {said}, the first of them {first}")
        yield found, features


def _features(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    try:
        with torch.no_grad(), exact_products():
            return extractor(images).float()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        raise StatisticsError(
            f"the extractor {extractor.name!r} does not take images of shape "
            f"{tuple(images.shape[1:])}: {reason}"
        ) from None
