"""SiT's own files: released weights (a bare state dict) and training checkpoints, as data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from merge_rl.core.sit_config import sit_config_from_shapes
from merge_rl.errors import CheckpointError, MergeRLError
from merge_rl.storage.extracted import Extracted, plain, shapes_of, state_dict
from merge_rl.storage.pickle_values import Record
from merge_rl.storage.torch_storage import TensorRef

DEFAULT_BATCH: Final = 256  # images a step, in the public training
_STEP: Final = re.compile(r"(?:.*[-_.])?(\d{7,9})")
_TRACKS: Final = {"model": "raw", "ema": "ema"}


def is_training_checkpoint(data: object) -> bool:
    """Whether data is that of a training checkpoint, with state dicts as "model" or "ema"."""
    return isinstance(data, dict) and any(isinstance(data.get(key), dict) for key in _TRACKS)


def read_training_checkpoint(
    data: Mapping[str, object], path: Path, weights: str, num_heads: int | None
) -> list[Extracted]:
    """Raw weights and their EMA as tracks; "auto" takes the EMA if there is one.

    The step number in the name gives nimg = step * global batch size, which is read from the
    checkpoint's arguments and is 256 by default. The optimizer is left alone.
    """
    args = data.get("args")
    settings = args.state if isinstance(args, Record) and isinstance(args.state, dict) else {}
    held = [key for key in _TRACKS if data.get(key) is not None]
    wanted = {"auto": held[-1:], "both": held}.get(weights, [weights])
    step = _STEP.fullmatch(path.stem)
    batch = settings.get("global_batch_size", DEFAULT_BATCH)
    fits = type(batch) is int and 0 < batch < 2**30
    found = []
    for key in wanted:
        if key not in held:
            raise CheckpointError(f"{path}: holds no {key!r}, only {' and '.join(held)}")
        tensors = _without_wrapper(state_dict(data[key], f"{path}, {key}"))
        config = _config(tensors, path, num_heads, settings.get("num_classes"))
        found.append(
            Extracted(
                path=path,
                tensors=tensors,
                config=config,
                stem=path.stem,
                folder=_TRACKS[key],
                nimg=int(step[1]) * batch if step and fits else None,
                track=_TRACKS[key],
                autoencoder=_autoencoder(config),
                facts={"training": plain(settings)} if settings else {},
            )
        )
    return found


def read_bare(tensors: Mapping[str, TensorRef], path: Path, num_heads: int | None) -> Extracted:
    """Released weights: one state dict and nothing else."""
    tensors = _without_wrapper(tensors)
    config = _config(tensors, path, num_heads)
    return Extracted(
        path=path,
        tensors=tensors,
        config=config,
        stem=path.stem,
        autoencoder=_autoencoder(config),
    )


def _without_wrapper(tensors: Mapping[str, TensorRef]) -> Mapping[str, TensorRef]:
    """Names without the "module." that a wrapper for several devices adds to each."""
    if all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _autoencoder(config: Mapping[str, Any]) -> str | None:
    return "sd-vae-sit" if config["in_channels"] == 4 else None


def _config(
    tensors: Mapping[str, TensorRef], path: Path, num_heads: int | None, classes: object = None
) -> dict[str, Any]:
    known = classes if type(classes) is int else None
    try:
        return sit_config_from_shapes(shapes_of(tensors), num_heads, known)
    except MergeRLError as error:
        raise CheckpointError(f"{path}: {error}") from None
