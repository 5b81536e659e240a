"""Merged weights to a folder that loads elsewhere: weights, config, recipe, model card."""

from __future__ import annotations

import contextlib
import dataclasses
import json
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
from merge_rl.storage.safetensors_header import TensorInfo
from merge_rl.storage.shards import MAX_SHARD_BYTES, WeightStream, write_weights
from merge_rl.version import __version__
from merge_rl.workflows.assemble import Job
from merge_rl.workflows.card import CardFacts, model_card
from merge_rl.workflows.comparison import Comparison
from merge_rl.workflows.licence import base_models, merged_licence
from merge_rl.workflows.merging import MergePlan, base_index, stream_merge
from merge_rl.workflows.recipe import TOOL, merge_recipe, recipe_metadata

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
    weights: Mapping[str, Tensor] | WeightStream,
    config: Mapping[str, Any] | None,
    *,
    coefficients: Tensor | Sequence[float] | None = None,
    recipe: Mapping[str, Any] | None = None,
    card: str | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
    replace: bool = False,
) -> Path:
    """Write a model folder: model.safetensors, config.json, merge.yaml, README.md.

    Args:
        out: folder; must not exist unless `replace`. It appears whole or not at all.
        weights: state dict with the official names, or a stream of one, which is never held as a
            whole; floating tensors are cast to `dtype`.
        config: model config ("model" and constructor options), or None if it is not known.
        coefficients: (K,) or (G, K), recorded in merge.yaml.
        recipe: what else merge.yaml shall say: sources, hashes, map.
        card: text of README.md.
        dtype: "float32", "float16" or "bfloat16".
        max_shard_bytes: above it the weights become shards with an index, as the Hub's libraries
            read them.
        metadata: further entries of the safetensors header.
        replace: swap an existing folder for the new one.

    Weights that are not finite are refused (NonFiniteWeightsError).
    """
    if dtype not in DTYPES:
        raise ConfigError(f"expected dtype one of {', '.join(DTYPES)}, got {dtype!r}")
    stream = weights if isinstance(weights, WeightStream) else WeightStream.of(weights)
    header = {**(recipe_metadata(recipe) if recipe and "sources" in recipe else {})}
    header |= {"config": json.dumps(dict(config), sort_keys=True)} if config else {}
    header |= metadata or {}
    with new_folder(out, replace=replace) as folder:
        write_weights(folder, stream.cast(DTYPES[dtype]), header, max_shard_bytes=max_shard_bytes)
        if config:
            write_json(folder / "config.json", dict(config))
        written = dict(recipe or {})
        if written:
            written |= {"dtype": dtype, "max_shard_bytes": max_shard_bytes}
        if coefficients is not None:
            written["coefficients"] = torch.as_tensor(coefficients, dtype=torch.float64).tolist()
        if written:
            write_yaml(folder / "merge.yaml", written)
        write_text(folder / "README.md", card or "# A merged diffusion model\n")
    return Path(out)


def save_merge(
    out: str | os.PathLike[str],
    checkpoints: CheckpointSet,
    coefficients: Tensor,
    *,
    plan: MergePlan,
    groups: Mapping[str, str],
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    licence: str | None = None,
    tool: str = TOOL,
    how: str = "Merged with coefficients that were given.",
) -> Path:
    """Merge a set with coefficients (G, K) and write the model folder, streaming.

    At no time are more than a few tensors in memory. `licence` is that of the merge, see
    `merged_licence`; `how` a sentence for the card.
    """
    recipe = merge_recipe(
        checkpoints, coefficients, base=plan.base, groups=groups, licence=licence, tool=tool
    )
    infos = {name: _merged_info(info) for name, info in checkpoints.tensors.items()}
    rows = coefficients.reshape(1, len(plan.groups.names), len(checkpoints))
    merged = ((name, outs[0]) for name, outs in stream_merge(checkpoints, plan, rows))
    facts = set_facts(checkpoints, plan.groups.names, coefficients, dtype, how, licence)
    return save_model(
        out, WeightStream(infos, merged), checkpoints.config, recipe=recipe,
        card=model_card(facts), dtype=dtype, max_shard_bytes=max_shard_bytes,
        metadata=carried_metadata(checkpoints, plan.base),
    )  # fmt: skip


def _merged_info(info: TensorInfo) -> TensorInfo:
    dtype = torch.float32 if info.dtype.is_floating_point else info.dtype
    return TensorInfo(info.shape, dtype)


def carried_metadata(checkpoints: CheckpointSet, base: int) -> dict[str, str]:
    """What a merge inherits from its base's file: how latents become images."""
    metadata = checkpoints.metadata(base)
    return {key: metadata[key] for key in CARRIED_METADATA if key in metadata}


def set_facts(
    checkpoints: CheckpointSet,
    group_names: Sequence[str],
    coefficients: Tensor,
    dtype: str,
    how: str,
    licence: str | None,
) -> CardFacts:
    """What a card tells of any merge of a set."""
    config = checkpoints.config or {}
    named = checkpoints.manifest.name if checkpoints.manifest else None
    return CardFacts(
        name=named or checkpoints.folder.resolve().name,
        family=str(config["model"]) if "model" in config else None,
        checkpoints=checkpoints.names,
        group_names=group_names,
        coefficients=coefficients,
        dtype=dtype,
        how=how,
        conditional=bool(config.get("label_dim") or config.get("num_classes")),
        licence=licence,
        base_models=base_models(checkpoints),
    )


def write_merged(
    path: Path, job: Job, config: OptimizeConfig, coefficients: Tensor, comparison: Comparison
) -> None:
    """The merged model of a finished search, float32, with recipe and card."""
    checkpoints, base = job.checkpoints, base_index(job.checkpoints, config.merge.start)
    licence = merged_licence(checkpoints, config.licence)
    recipe = merge_recipe(
        checkpoints, coefficients, base=base, groups=config.merge.groups, licence=licence
    )
    recipe["search"] = {k: v for k, v in to_mapping(config).items() if k not in _PATHS}
    recipe["comparison"] = comparison.as_dict()
    weights = job.flat.weights(coefficients)
    # The official order of names, so that files compare line by line with their sources.
    ordered = {name: weights[name] for name in checkpoints.tensors}
    how = (
        f"Found by merge_rl {__version__} with the searcher `{config.search.name}` and the "
        f"reward `{config.reward.text}`, {config.budget} generated images at most, seed "
        f"{config.seed}."
    )
    facts = set_facts(checkpoints, job.group_names, coefficients, "float32", how, licence)
    sources = {name: reference.source for name, reference in job.references.items()}
    facts = dataclasses.replace(
        facts, comparison=comparison, extractor=config.extractor, data=sources
    )
    save_model(
        path, ordered, checkpoints.config, recipe=recipe, card=model_card(facts), replace=True,
        metadata=carried_metadata(checkpoints, base),
    )  # fmt: skip


_PATHS = ("checkpoints", "extractor_weights", "reference", "heldout")
CARRIED_METADATA = ("encoder",)
