"""Many EMA profiles rebuilt from a run's snapshots in one pass over the files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from merge_rl.errors import ConfigError
from merge_rl.storage.checkpoints import CheckpointSet
from merge_rl.storage.hashing import sha256_file
from merge_rl.storage.manifest import MANIFEST_NAME, CheckpointEntry, Manifest, write_manifest
from merge_rl.storage.safetensors_header import TensorInfo
from merge_rl.storage.shards import tensor_file
from merge_rl.workflows.export import DTYPES, carried_metadata, new_folder
from merge_rl.workflows.merging import plan_merge, stream_merge
from merge_rl.workflows.models import ema_coefficients
from merge_rl.workflows.recipe import merge_recipe, recipe_metadata


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
    if dtype not in DTYPES:
        raise ConfigError(f"expected dtype one of {', '.join(DTYPES)}, got {dtype!r}")
    nimg = max(int(n or 0) for n in checkpoints.nimg)
    names = [f"phema-{nimg // 1000:07d}-{std:.3f}" for std in ema_stds]
    if len(set(names)) < len(names):
        raise ConfigError(
            "expected widths that differ in their three decimals, got some that agree"
        )
    rows = [ema_coefficients(checkpoints, std) for std in ema_stds]
    plan = plan_merge(checkpoints, base=base)
    infos = {
        name: TensorInfo(info.shape, DTYPES[dtype] if info.dtype.is_floating_point else info.dtype)
        for name, info in checkpoints.tensors.items()
    }
    inherited = carried_metadata(checkpoints, plan.base)
    with new_folder(out) as folder:
        with ExitStack() as stack:
            sinks = []
            for name, row in zip(names, rows, strict=True):
                recipe = merge_recipe(checkpoints, row, base=plan.base, groups={}, licence=licence)
                metadata = {**recipe_metadata(recipe), **inherited}
                path = folder / f"{name}.safetensors"
                sinks.append(stack.enter_context(tensor_file(path, infos, metadata)))
            for tensor, outs in stream_merge(checkpoints, plan, torch.stack(rows)[:, None]):
                for put, merged in zip(sinks, outs, strict=True):
                    put(tensor, merged.to(infos[tensor].dtype))
        entries = [
            CheckpointEntry(
                file=f"{name}.safetensors", nimg=nimg, ema_std=round(std, 12),
                sha256=sha256_file(folder / f"{name}.safetensors"),
            )
            for name, std in zip(names, ema_stds, strict=True)
        ]  # fmt: skip
        if checkpoints.config is not None:
            named = checkpoints.manifest.name if checkpoints.manifest else None
            manifest = Manifest(
                name=f"{named or checkpoints.folder.resolve().name}-phema", licence=licence,
                model=checkpoints.config, checkpoints=tuple(entries),
            )  # fmt: skip
            write_manifest(folder / MANIFEST_NAME, manifest)
    return names
