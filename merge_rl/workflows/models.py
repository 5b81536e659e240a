"""Merge once, load a model: the short ways of the public API."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from merge_rl.core.ema_profiles import posthoc_coefficients
from merge_rl.errors import ConfigError
from merge_rl.storage.checkpoints import CheckpointSet
from merge_rl.storage.hub import local_model
from merge_rl.workflows.assemble import load_network
from merge_rl.workflows.merging import plan_merge, stream_merge


def load_model(path: str | os.PathLike[str]) -> nn.Module:
    """The network of a model folder or of one .safetensors of a set, float32, evaluation mode.

    The text "user/repo" or "user/repo@revision" means a model of the Hub, unless there is such a
    path here; it is downloaded to the cache of the Hub's client.
    """
    return load_network(local_model(path))


def merge(
    checkpoints: CheckpointSet,
    coefficients: Tensor | Sequence[float] | Sequence[Sequence[float]],
    *,
    groups: Mapping[str, str] | None = None,
    base: str = "newest",
) -> dict[str, Tensor]:
    """Weighted sum of a set's checkpoints, dict of float32 tensors with the official names.

    Args:
        checkpoints: an open set.
        coefficients: (K,), or (G, K) with one row a group of tensors.
        groups: group name -> regular expression of tensor names, as in `MergeConfig`.
        base: name of the checkpoint whose buffers (Fourier frequencies and phases) are carried;
            the newest by default. Buffers are never averaged.

    The files are read once, a piece at a time: besides the result a few MiB are held. Raises
    ConfigError for coefficients of another shape, or that are not finite.
    """
    values = torch.as_tensor(coefficients, dtype=torch.float64)
    plan = plan_merge(checkpoints, groups=groups, base=base)
    rows = values.reshape(1, -1) if values.ndim == 1 else values
    return {name: outs[0] for name, outs in stream_merge(checkpoints, plan, rows[None])}


def ema_coefficients(checkpoints: CheckpointSet, ema_std: float, nimg: int | None = None) -> Tensor:
    """Coefficients (K,) that rebuild the power-function EMA of width `ema_std` ending at `nimg`.

    Uses every checkpoint with 0 < nimg <= the end (Karras et al., 2024, arXiv:2312.02696, section
    3.2); the end is the newest checkpoint's by default. All of them need an ema_std.
    """
    times, widths = checkpoints.nimg, checkpoints.ema_std
    lacking = [
        name
        for name, time, width in zip(checkpoints.names, times, widths, strict=True)
        if time is None or width is None
    ]
    if lacking:
        raise ConfigError(
            f"an EMA profile needs nimg and ema_std of every checkpoint; {lacking[0]!r} and "
            f"{len(lacking) - 1} more have none (choose the EMA tracks with --track)"
        )
    known = torch.tensor([float(t or 0) for t in times], dtype=torch.float64)
    end = float(nimg) if nimg is not None else float(known.max())
    seen = (known > 0) & (known <= end)
    if not bool(seen.any()):
        raise ConfigError(f"no checkpoint ends at or before {end:.0f} images")
    std = torch.tensor([float(w or 0) for w in widths], dtype=torch.float64)
    row = torch.zeros(len(checkpoints), dtype=torch.float64)
    row[seen] = posthoc_coefficients(known[seen], std[seen], [end], [ema_std])[:, 0]
    return row
