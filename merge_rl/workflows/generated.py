"""Features of images that a network generates from a block of seeds, in pieces that can be kept."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from merge_rl.config import SamplerConfig
from merge_rl.core.compatibility import DENOISED, VELOCITY, prediction_of
from merge_rl.errors import NonFiniteSamplesError
from merge_rl.workflows.feature_store import FeatureStore
from merge_rl.workflows.rollout import Rollout, balanced_labels

PIECE_ROWS: Final = 1000  # images whose noise is held, and whose features are written, at once


def block_features(
    rollout: Rollout,
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
    labels = balanced_labels(count, num_classes)
    name = f"{section}-{first_seed}-{first_seed + count - 1}"
    key = {"sampler": sampler_summary(rollout.sampler, prediction_of(rollout.model))}
    if store is not None:
        done = store.load(name, key)
        if done is not None:
            rollout.on_images(count)
            return done
    work = store.pieces(name, key) if store is not None else None
    parts = []
    for start in range(0, count, PIECE_ROWS):
        stop = min(start + PIECE_ROWS, count)
        piece = f"features-{start:09d}"
        found = work.read(piece) if work is not None else None
        if found is not None and len(found[0]["features"]) == stop - start:
            rollout.on_images(stop - start)
            parts.append(found[0]["features"])
            continue
        parts.append(
            _piece(rollout, range(first_seed + start, first_seed + stop), labels[start:stop])
        )
        if work is not None and stop < count:
            work.write(piece, {"features": parts[-1]}, {})
    features = torch.cat(parts)
    if store is not None:
        store.save(name, key, features, labels)
    return features


def _piece(rollout: Rollout, seeds: range, labels: Tensor) -> Tensor:
    noise = rollout.noise(seeds)
    features = rollout.features(noise, labels)
    failed = ~features.isfinite().all(1)
    if bool(failed.any()):
        row = int(failed.nonzero()[0])
        where = _failed_step(rollout, noise[row : row + 1], labels[row : row + 1])
        raise NonFiniteSamplesError(
            "the model generates samples that are not finite: no score "
            f"(the image of seed {seeds[row]}{where})"
        )
    return features


def _failed_step(rollout: Rollout, noise: Tensor, label: Tensor) -> str:
    """Where one image ceases to be finite, for a message; it is made again with a look inside."""
    try:
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
