"""Features of images that a network generates from a block of seeds, in pieces that can be kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from merge_rl.config import SamplerConfig
from merge_rl.core.compatibility import DENOISED, VELOCITY, prediction_of
from merge_rl.errors import NonFiniteSamplesError
from merge_rl.storage.work_folder import WorkFolder
from merge_rl.workflows.fast import matmul_precision
from merge_rl.workflows.feature_store import FeatureStore
from merge_rl.workflows.rollout import MergedRollout, Rollout, WorkItem, balanced_labels

PIECE_ROWS: Final = 1000  # images whose noise is held, and whose features are written, at once


def block_features(
    made: MergedRollout,
    first_seed: int,
    count: int,
    num_classes: int,
    *,
    section: str = "ode",
    store: FeatureStore | None = None,
) -> Tensor:
    """Features (N, D) of the images of seeds first_seed ... first_seed + N - 1, labels balanced.

    With a store, finished pieces are kept and not made again. NonFiniteSamplesError, with the seed
    and the step, where a sample is not finite: never a score of the others.
    """
    labels, rollout = balanced_labels(count, num_classes), made.rollout
    name = f"{section}-{first_seed}-{first_seed + count - 1}"
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
        for span, features in zip(chosen, _pieces(made, first_seed, labels, chosen), strict=True):
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
    made: MergedRollout, first_seed: int, labels: Tensor, spans: Sequence[slice]
) -> list[Tensor]:
    items = [
        WorkItem(None, range(first_seed + s.start, first_seed + s.stop), labels[s]) for s in spans
    ]
    found = made.features_of(items, f"images from seed {items[0].seeds[0]}")
    for item, features in zip(items, found, strict=True):
        failed = ~features.isfinite().all(1)
        if bool(failed.any()):
            row = int(failed.nonzero()[0])
            noise = made.rollout.noise([item.seeds[row]])
            where = _failed_step(made.rollout, noise, item.labels[row : row + 1])
            raise NonFiniteSamplesError(
                "the model generates samples that are not finite: no score "
                f"(the image of seed {item.seeds[row]}{where})"
            )
    return found


def _failed_step(rollout: Rollout, noise: Tensor, label: Tensor) -> str:
    """Where one image ceases to be finite, for a message; it is made again with a look inside."""
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
    return {name: getattr(sampler, name) for name in names}
