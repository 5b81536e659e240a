"""Merged weights to a folder that loads elsewhere: weights, config, recipe, model card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from merge_rl.core.merging.stored_numbers import Raw, narrow
from merge_rl.errors import ConfigError, NonFiniteWeightsError
from merge_rl.storage.checkpoints import (
    SCHEDULER_PLACE,
    CheckpointSet,
    MergePlan,
    is_of_library,
    library_documents,
    merge_pass,
)
from merge_rl.storage.files import (
    DIFFUSERS_STEM,
    MAX_SHARD_BYTES,
    MODEL_STEM,
    TensorInfo,
    WeightStream,
    new_folder,
    weights_files,
    write_json,
    write_text,
    write_weights,
    write_yaml,
)
from merge_rl.workflows.export.card import CardFacts, base_models, model_card
from merge_rl.workflows.export.recipe import (
    MERGEKIT_NAME,
    TOOL,
    Recipe,
    coefficient_rows,
    merge_recipe,
    mergekit_document,
    recipe_metadata,
)

if TYPE_CHECKING:
    from torch import Tensor

DTYPES: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # as the format says


def save_model(
    out: str | os.PathLike[str],
    weights: Mapping[str, Tensor] | WeightStream,
    config: Mapping[str, Any] | None,
    *,
    coefficients: npt.ArrayLike | None = None,
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

    Raises NonFiniteWeightsError for weights that are not finite, RunError for a folder that exists,
    ConfigError for another dtype.
    """
    code = stored_as(dtype)
    stream = weights if isinstance(weights, WeightStream) else WeightStream.of(weights)
    written = dict(recipe or {})
    if written:
        written |= {"dtype": dtype, "max_shard_bytes": max_shard_bytes}
    if coefficients is not None:
        written["coefficients"] = np.asarray(coefficients, np.float64).tolist()
    with new_folder(out, replace=replace) as folder:
        header = _header(recipe, config, metadata)
        write_weights(
            folder, stream.cast(code), header, max_shard_bytes=max_shard_bytes,
            stem=_stem(config),
        )  # fmt: skip
        _write_papers(folder, config, written, card)
    return Path(out)


def stored_as(dtype: str) -> str:
    """What the format calls it; ConfigError for a type that no merge is written in."""
    if dtype not in DTYPES:
        raise ConfigError(f"expected dtype one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def _header(
    recipe: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
    metadata: Mapping[str, str] | None,
) -> dict[str, str]:
    header = recipe_metadata(recipe) if recipe and "sources" in recipe else {}
    header |= {"config": json.dumps(dict(config), sort_keys=True)} if config else {}
    return {"format": "pt", **header, **(metadata or {})}


def _stem(config: Mapping[str, Any] | None) -> str:
    return DIFFUSERS_STEM if config is not None and is_of_library(config) else MODEL_STEM


def _write_papers(
    folder: Path, config: Mapping[str, Any] | None, recipe: Mapping[str, Any], card: str | None
) -> None:
    if config:
        own, scheduler = (
            library_documents(config) if is_of_library(config) else (dict(config), None)
        )
        write_json(folder / "config.json", own)
        if scheduler:
            (folder / SCHEDULER_PLACE).parent.mkdir()
            write_json(folder / SCHEDULER_PLACE, scheduler)
    if recipe:
        write_yaml(folder / "merge.yaml", recipe)
    other = mergekit_document(recipe)
    if other is not None:
        write_yaml(folder / MERGEKIT_NAME, other)
    write_text(folder / "README.md", card or "# A merged diffusion model\n")


def save_merge(
    out: str | os.PathLike[str],
    checkpoints: CheckpointSet,
    coefficients: npt.ArrayLike,
    *,
    plan: MergePlan,
    groups: Mapping[str, str],
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    licence: str | None = None,
    known: Recipe | None = None,
    how: str = "Merged with coefficients that were given.",
) -> Path:
    """Merge a set with coefficients (G, K) and write the model folder, in one pass over the files.

    They are hashed and summed as they are read, and each block is written when it is summed; see
    `merge_pass`. `licence` is that of the merge, see `merged_licence`; `known` the recipe that it
    is made again from, whose tuned sampler goes along with its guide; `how` a sentence for the
    card.
    """
    tool, guide = (known.tool, known.guide) if known else (TOOL, None)
    code, rows = stored_as(dtype), coefficient_rows(coefficients, len(checkpoints))

    def recipe(digests: Sequence[str] | None) -> dict[str, Any]:
        return merge_recipe(
            checkpoints, rows, base=plan.base, groups=groups, frozen=plan.frozen,
            licence=licence, tool=tool, digests=digests,
        )  # fmt: skip

    def header(found: Mapping[str, Any]) -> dict[str, str]:
        return _header(found, checkpoints.config, carried_metadata(checkpoints.metadata(plan.base)))

    infos = {name: info.cast(code) for name, info in checkpoints.tensors.items()}
    # The header has the hashes, and comes first: room for them until they are known.
    draft = header(recipe(["0" * 64] * len(checkpoints)))
    with new_folder(out) as folder:
        with weights_files(
            folder, infos, draft, max_shard_bytes=max_shard_bytes, stem=_stem(checkpoints.config)
        ) as files:
            merge_pass(checkpoints, plan, [rows], writer([files.write], infos), hashed=True)
            made = recipe(None)
            files.describe(header(made))
        facts = set_facts(checkpoints, plan.groups.names, rows, dtype, how, licence)
        made |= {"dtype": dtype, "max_shard_bytes": max_shard_bytes}
        if known and known.sampler is not None:
            made["sampler"] = dict(known.sampler)
        if guide is not None:
            shutil.copytree(guide, folder / guide.name)
        _write_papers(folder, checkpoints.config, made, model_card(facts))
    return Path(out)


def writer(
    sinks: Sequence[Callable[[str, int, Raw], None]], infos: Mapping[str, TensorInfo]
) -> Callable[[int, str, int, Raw], None]:
    """What takes the blocks of a `merge_pass` to one file a merge, in the types of `infos`."""

    def put(p: int, name: str, start: int, values: Raw) -> None:
        info = infos[name]
        stored = narrow(values, info.code) if info.is_floating else values
        if stored is None:
            raise NonFiniteWeightsError(
                f"tensor {name!r} of the merge overflows {info.type_name}; expected a wider type"
            )
        sinks[p](name, start * info.itemsize, stored)

    return put


def carried_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """What is made of a model inherits this of its file's metadata: how latents become images."""
    return {key: metadata[key] for key in ("encoder",) if key in metadata}


def set_facts(
    checkpoints: CheckpointSet,
    group_names: Sequence[str],
    coefficients: npt.ArrayLike,
    dtype: str,
    how: str,
    licence: str | None,
) -> CardFacts:
    """What a card tells of any merge of a set."""
    config = checkpoints.config or {}
    return CardFacts(
        name=checkpoints.title,
        family=str(config["model"]) if "model" in config else None,
        checkpoints=checkpoints.names,
        group_names=group_names,
        coefficients=coefficient_rows(coefficients, len(checkpoints)),
        dtype=dtype,
        how=how,
        conditional=bool(config.get("label_dim") or config.get("num_classes")),
        licence=licence,
        base_models=base_models(checkpoints),
    )


def dtype_of(weights: Mapping[str, Tensor]) -> str:
    """The floating type that all of the weights have, float32 for several."""
    infos = WeightStream.of(weights).infos.values()
    kinds = {info.code for info in infos if info.is_floating}
    return next((name for name, code in DTYPES.items() if kinds == {code}), "float32")
