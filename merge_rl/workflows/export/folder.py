"""Merged weights to a folder that loads elsewhere: weights, config, recipe, model card."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_rl.errors import ConfigError
from merge_rl.storage.checkpoints import (
    SCHEDULER_PLACE,
    CheckpointSet,
    MergePlan,
    is_of_library,
    library_documents,
    stream_merge,
)
from merge_rl.storage.files import (
    DIFFUSERS_STEM,
    MAX_SHARD_BYTES,
    MODEL_STEM,
    TensorInfo,
    WeightStream,
    new_folder,
    write_json,
    write_text,
    write_weights,
    write_yaml,
)
from merge_rl.workflows.export.card import CardFacts, base_models, model_card
from merge_rl.workflows.export.recipe import (
    MERGEKIT_NAME,
    TOOL,
    merge_recipe,
    mergekit_document,
    recipe_metadata,
)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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

    A network of diffusers is written as that library lays it out, so that its `from_pretrained`
    loads the folder: diffusion_pytorch_model.safetensors, the library's config.json, and the
    scheduler's in scheduler/.

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
    header = {"format": "pt", **header, **(metadata or {})}
    library = config is not None and is_of_library(config)
    with new_folder(out, replace=replace) as folder:
        write_weights(
            folder, stream.cast(DTYPES[dtype]), header, max_shard_bytes=max_shard_bytes,
            stem=DIFFUSERS_STEM if library else MODEL_STEM,
        )  # fmt: skip
        if config:
            own, scheduler = library_documents(config) if library else (dict(config), None)
            write_json(folder / "config.json", own)
            if scheduler:
                (folder / SCHEDULER_PLACE).parent.mkdir()
                write_json(folder / SCHEDULER_PLACE, scheduler)
        written = dict(recipe or {})
        if written:
            written |= {"dtype": dtype, "max_shard_bytes": max_shard_bytes}
        if coefficients is not None:
            written["coefficients"] = torch.as_tensor(coefficients, dtype=torch.float64).tolist()
        if written:
            write_yaml(folder / "merge.yaml", written)
        other = mergekit_document(written)
        if other is not None:
            write_yaml(folder / MERGEKIT_NAME, other)
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
        checkpoints, coefficients, base=plan.base, groups=groups, frozen=plan.frozen,
        licence=licence, tool=tool,
    )  # fmt: skip
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
    return TensorInfo(info.shape, "F32" if info.is_floating else info.code)


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


CARRIED_METADATA = ("encoder",)


def dtype_of(weights: Mapping[str, Tensor]) -> str:
    """The floating type that all of the weights have, float32 for several."""
    kinds = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    return next((name for name, dtype in DTYPES.items() if kinds == {dtype}), "float32")
