"""Merged weights to a folder that loads elsewhere: weights, config, recipe, model card."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_rl.config import OptimizeConfig, to_mapping
from merge_rl.errors import ConfigError, RunError
from merge_rl.storage.atomic import write_json, write_text, write_yaml
from merge_rl.storage.checkpoints import CheckpointSet
from merge_rl.storage.model_file import save_checkpoint
from merge_rl.version import __version__
from merge_rl.workflows.assemble import Job
from merge_rl.workflows.card import model_card
from merge_rl.workflows.comparison import Comparison
from merge_rl.workflows.merging import base_index

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def require_new(path: str | os.PathLike[str]) -> None:
    """Raise RunError if something lies at `path`."""
    if Path(path).exists() or Path(path).is_symlink():
        raise RunError(f"{path} exists already; choose another folder")


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` if the block succeeds.

    An existing path is refused unless `replace` is set; then it is swapped at the end.
    """
    target = Path(path)
    if not replace:
        require_new(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp's 0700 would follow the folder
        yield temporary
        if target.is_dir() and replace:
            shutil.rmtree(target)
        temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def save_model(
    out: str | os.PathLike[str],
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
    *,
    coefficients: Tensor | Sequence[float] | None = None,
    recipe: Mapping[str, Any] | None = None,
    card: str | None = None,
    dtype: str = "float32",
    replace: bool = False,
) -> Path:
    """Write a model folder: model.safetensors, config.json, merge.yaml, README.md.

    Args:
        out: folder; must not exist unless `replace`. It appears whole or not at all.
        weights: state dict with the official names; floating tensors are cast to `dtype`.
        config: model config ("model" and constructor options), or None if it is not known.
        coefficients: (K,) or (G, K), recorded in merge.yaml.
        recipe: what else merge.yaml shall say: sources, hashes, map.
        card: text of README.md.
        dtype: "float32", "float16" or "bfloat16".
        replace: swap an existing folder for the new one.

    Weights that are not finite are refused (NonFiniteWeightsError).
    """
    if dtype not in DTYPES:
        raise ConfigError(f"expected dtype one of {', '.join(DTYPES)}, got {dtype!r}")
    cast = {k: v.to(DTYPES[dtype]) if v.is_floating_point() else v for k, v in weights.items()}
    with new_folder(out, replace=replace) as folder:
        save_checkpoint(folder / "model.safetensors", cast, {"config": config} if config else {})
        if config:
            write_json(folder / "config.json", dict(config))
        written = {**recipe, "dtype": dtype} if recipe else {}
        if coefficients is not None:
            written["coefficients"] = torch.as_tensor(coefficients, dtype=torch.float64).tolist()
        if written:
            write_yaml(folder / "merge.yaml", written)
        write_text(folder / "README.md", card or "# A merged diffusion model\n")
    return Path(out)


def merge_recipe(
    checkpoints: CheckpointSet, coefficients: Tensor, *, base: int, groups: Mapping[str, str]
) -> dict[str, Any]:
    """What it takes to make the merge again: sources with hashes, coefficients, groups, base."""
    rows = coefficients.reshape(-1, len(checkpoints))
    return {
        "version": 1,
        "tool": f"merge_rl {__version__}",
        "base": checkpoints.names[base],
        "groups": dict(groups),
        "sources": [
            {
                "name": name,
                "file": checkpoints.entries[i].file,
                "nimg": checkpoints.nimg[i],
                "ema_std": checkpoints.ema_std[i],
                "sha256": checkpoints.sha256(i),
                "coefficients": rows[:, i].tolist(),
            }
            for i, name in enumerate(checkpoints.names)
        ],
    }


def write_merged(
    path: Path, job: Job, config: OptimizeConfig, coefficients: Tensor, comparison: Comparison
) -> None:
    """The merged model of a finished search, float32, with recipe and card."""
    merge = config.merge
    base = base_index(job.checkpoints, merge.start)
    recipe = merge_recipe(job.checkpoints, coefficients, base=base, groups=merge.groups)
    recipe["search"] = {k: v for k, v in to_mapping(config).items() if k not in _PATHS}
    recipe["comparison"] = comparison.as_dict()
    weights = job.flat.weights(coefficients)
    # The official order of names, so that files compare line by line with their sources.
    ordered = {name: weights[name] for name in job.checkpoints.tensors}
    card = model_card(job, config, coefficients, comparison)
    save_model(path, ordered, job.checkpoints.config, recipe=recipe, card=card, replace=True)


_PATHS = ("checkpoints", "extractor_weights", "reference", "heldout")
