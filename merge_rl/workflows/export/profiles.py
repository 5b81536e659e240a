"""Many EMA profiles rebuilt from a run's snapshots in one pass over the files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from merge_rl.errors import ConfigError
from merge_rl.storage.checkpoints import (
    MANIFEST_NAME,
    CheckpointEntry,
    CheckpointSet,
    Manifest,
    merge_pass,
    plan_merge,
    write_manifest,
)
from merge_rl.storage.files import new_folder, sha256_file, tensor_file
from merge_rl.storage.hub import open_checkpoints
from merge_rl.workflows.export.folder import carried_metadata, stored_as, writer
from merge_rl.workflows.export.recipe import merge_recipe, recipe_metadata

if TYPE_CHECKING:
    from torch import Tensor


def save_profiles(
    out: str | os.PathLike[str],
    checkpoints: CheckpointSet,
    ema_stds: Sequence[float],
    *,
    base: str = "newest",
    dtype: str = "float32",
    licence: str | None = None,
) -> list[str]:
    """Write one checkpoint for each EMA width as a new set with a manifest; the names written.

    Every source file is read once, whatever the number of profiles, and a few tensors are held at
    a time. Files are named as the official tool names them, `phema-{kimg:07d}-{ema_std:.3f}`; each
    carries its coefficients and the hashes of its sources. The profiles end at the newest
    checkpoint (Karras et al., 2024, arXiv:2312.02696, section 3.2).
    """
    code = stored_as(dtype)
    nimg = max(int(n or 0) for n in checkpoints.nimg)
    names = [f"phema-{nimg // 1000:07d}-{std:.3f}" for std in ema_stds]
    if len(set(names)) < len(names):
        raise ConfigError(
            "expected widths that differ in their three decimals, got some that agree"
        )
    rows = [ema_coefficients(checkpoints, std) for std in ema_stds]
    plan = plan_merge(checkpoints, base=base)
    infos = {name: info.cast(code) for name, info in checkpoints.tensors.items()}
    inherited = carried_metadata(checkpoints.metadata(plan.base))

    def headers(digests: Sequence[str] | None) -> list[dict[str, str]]:
        recipes = [
            merge_recipe(
                checkpoints, row, base=plan.base, groups={}, licence=licence, digests=digests
            )
            for row in rows
        ]
        return [recipe_metadata(recipe) | inherited for recipe in recipes]

    with new_folder(out) as folder:
        with ExitStack() as stack:
            drafts = headers(["0" * 64] * len(checkpoints))
            files = [
                stack.enter_context(tensor_file(folder / f"{name}.safetensors", infos, metadata))
                for name, metadata in zip(names, drafts, strict=True)
            ]
            table = np.stack([row.numpy() for row in rows])[:, None]
            put = writer([file.write for file in files], infos)
            merge_pass(checkpoints, plan, table, put, hashed=True)
            for file, metadata in zip(files, headers(None), strict=True):
                file.describe(metadata)
        entries = [
            CheckpointEntry(
                file=f"{name}.safetensors", nimg=nimg, ema_std=round(std, 12),
                sha256=sha256_file(folder / f"{name}.safetensors"),
            )
            for name, std in zip(names, ema_stds, strict=True)
        ]  # fmt: skip
        _write_manifest(folder, checkpoints, entries, licence)
    return names


def _write_manifest(
    folder: Path,
    checkpoints: CheckpointSet,
    entries: Sequence[CheckpointEntry],
    licence: str | None,
) -> None:
    """The manifest of averages of a set, where its network is known."""
    if checkpoints.config is None:
        return
    manifest = Manifest(
        name=f"{checkpoints.title}-phema", licence=licence,
        model=checkpoints.config, checkpoints=tuple(entries),
    )  # fmt: skip
    write_manifest(folder / MANIFEST_NAME, manifest)


def merge(
    checkpoints: CheckpointSet | str | os.PathLike[str],
    coefficients: npt.ArrayLike,
    *,
    groups: Mapping[str, str] | None = None,
    base: str = "newest",
) -> dict[str, Tensor]:
    """Weighted sum of a set's checkpoints, dict of float32 tensors with the official names.

    Args:
        checkpoints: an open set, or what `merge_rl.open_checkpoints` opens.
        coefficients: (K,), or (G, K) with one row a group of tensors.
        groups: group name -> regular expression of tensor names, as in `MergeConfig`.
        base: name of the checkpoint whose buffers (Fourier frequencies and phases) are carried;
            the newest by default. Buffers are never averaged.

    The files are read once, a piece at a time: besides the result a few MiB are held. Raises
    ConfigError for coefficients of another shape, that are no numbers, or not finite, its kind
    UnknownNameError for a `base` that is not in the set, CheckpointError for what is no set.
    """
    from merge_rl.storage.checkpoints import merge_into_memory

    try:
        values = np.asarray(coefficients, np.float64)
    except (TypeError, ValueError):
        raise ConfigError(f"expected coefficients as numbers, got {coefficients!r:.60}") from None
    if not isinstance(checkpoints, CheckpointSet):
        checkpoints = open_checkpoints(checkpoints)
    plan = plan_merge(checkpoints, groups=groups, base=base)
    rows = values.reshape(1, -1) if values.ndim == 1 else values
    found = merge_into_memory(checkpoints, plan, rows[None])
    return {name: outs[0] for name, outs in found.items()}


def ema_coefficients(checkpoints: CheckpointSet, ema_std: float, nimg: int | None = None) -> Tensor:
    """Coefficients (K,) that rebuild the power-function EMA of width `ema_std` ending at `nimg`.

    Uses every checkpoint with 0 < nimg <= the end (Karras et al., 2024, arXiv:2312.02696, section
    3.2); the end is the newest checkpoint's by default. All of them need an ema_std.
    """
    import torch

    from merge_rl.core.merging.ema_profiles import Profiles, exponent_from_std

    times, exponents = checkpoints.nimg, checkpoints.ema_gamma
    lacking = [
        name
        for name, time, gamma in zip(checkpoints.names, times, exponents, strict=True)
        if time is None or gamma is None
    ]
    if lacking:
        raise ConfigError(
            f"an EMA profile needs nimg and ema_std of every checkpoint; {lacking[0]!r} and "
            f"{len(lacking) - 1} more have none (choose the EMA tracks with --track, or say the "
            "widths of averages to convert, --ema-std)"
        )
    known = torch.tensor([float(t or 0) for t in times], dtype=torch.float64)
    end = float(nimg) if nimg is not None else float(known.max())
    begun = known > checkpoints.ema_start
    if not bool(begun.any()):
        raise ConfigError(f"no checkpoint ends at or before {end:.0f} images")
    gamma = torch.tensor([g for g in exponents if g is not None], dtype=torch.float64)
    profiles = Profiles(known[begun], gamma[begun], checkpoints.ema_start)
    row = torch.zeros(len(checkpoints), dtype=torch.float64)
    row[begun] = profiles.row(end, exponent_from_std(ema_std))
    return row
