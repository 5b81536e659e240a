"""What a search shows of itself that decides nothing: its held-out curve, pictures of both ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from merge_rl.core.distances.frechet import FrechetReference
from merge_rl.core.sampling.compatibility import balanced_labels
from merge_rl.errors import NonFiniteSamplesError
from merge_rl.interfaces import Tracker
from merge_rl.storage.files import enlarge, image_grid, side_by_side, write_picture, write_png
from merge_rl.storage.runs import RunDir
from merge_rl.workflows.assembly import Job
from merge_rl.workflows.evaluate import Comparison
from merge_rl.workflows.report import NAMES, interval
from merge_rl.workflows.rewards import Pool

SMALL: Final = 64  # pixels a side, up to which more images are shown
WIDTH: Final = 480  # pixels that a grid is enlarged to, or nearly so


class HeldOutCurve:
    """Fréchet distance of the pool to held-out statistics, which no step of a search looks at.

    Only where the reward reads the features that these statistics are of.
    """

    def __init__(self, job: Job) -> None:
        own = job.rollout.rollout.extractor is job.final_rollout.rollout.extractor
        known = job.references.get("heldout") if own else None
        self._reference = None if known is None else FrechetReference.from_stats(known.stats)

    def of(self, pool: Pool | None) -> dict[str, float]:
        """For an event: {"heldout": FID}, or nothing."""
        if pool is None or self._reference is None:
            return {}
        return {"heldout": self._reference.distance(pool.stats)}


def write_samples(
    run: RunDir, job: Job, merges: Mapping[str, Tensor], comparison: Comparison, tracker: Tracker
) -> None:
    """RUN/samples and RUN/before-after.png: images of merges (G, K) by entry, on equal seeds.

    The seeds count up from that of the run, as those of `mergerl sample --seed` do. An entry whose
    samples are not finite has no picture, and neither has what is no image.
    """
    if not job.parts.makes_images:
        return
    merged, settings = job.final_rollout, job.parts.settings
    seed = settings.seed
    count, columns = picture_layout(settings.autoencoder, job.parts.shape)
    labels = balanced_labels(count, job.num_classes)
    noise = merged.rollout.noise(range(seed, seed + count))
    tracker.phase("pictures", len(merges) * count)
    panels, size = [], (0, 0)
    for entry, rows in merges.items():
        merged.merge(rows)
        try:
            images = merged.rollout.images(noise, labels)
        except NonFiniteSamplesError:
            continue
        if images.dtype != torch.uint8 or images.ndim != 4:  # a decoder of the user's
            return
        size = (images.shape[2], images.shape[3])
        write_png(run.path / f"samples/{entry}.png", image_grid(images, columns, padding=0))
        grid = image_grid(images, columns)
        score = interval(comparison.summary(entry)[comparison.headline])
        caption = f"{entry}\n{NAMES[comparison.headline]} FID {score}"
        panels.append((caption, enlarge(grid, max(1, WIDTH // grid.shape[-1]))))
    if panels:
        write_picture(run.path / "before-after.png", side_by_side(panels))
        shown = [int(label) for label in labels] if job.num_classes else [None] * count
        record = {"height": size[0], "width": size[1], "columns": columns, "first_seed": seed}
        run.write("samples/samples.json", {**record, "labels": shown})


def picture_layout(autoencoder: str | None, shape: Sequence[int]) -> tuple[int, int]:
    """Images and columns of a grid, by what decodes samples of a shape."""
    large = autoencoder is not None or max(shape[1:], default=0) > SMALL
    return (12, 4) if large else (30, 10)
