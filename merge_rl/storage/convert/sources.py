"""What a file to convert is, and the weights in it: the one place that knows all kinds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from merge_rl.core.state_dicts import hold, names_for
from merge_rl.errors import CheckpointError
from merge_rl.storage.checkpoints import (
    find_listing,
    first_config,
    is_network_config,
    library_document,
    metadata_config,
    network_config,
    recorded_facts,
)
from merge_rl.storage.convert import edm2 as edm2_source
from merge_rl.storage.convert.adapters import (
    CONFIG,
    adapter_config,
    as_factors,
    as_products,
    facts_of,
    notes_of,
)
from merge_rl.storage.convert.contents import (
    DEFAULT_BATCH,
    NO_HINTS,
    Extracted,
    Hints,
    require_size,
    state_dict,
)
from merge_rl.storage.convert.distcp import files_of_metadata, read_sharded
from merge_rl.storage.convert.layouts import Place, place_of, read_library, steps_of
from merge_rl.storage.convert.states import INDEX, holds_states, read_only_state, read_states
from merge_rl.storage.convert.trainers import (
    by_place,
    is_composer,
    is_lightning,
    of_composer,
    precision_note,
    require_no_optimizer,
    require_whole,
    unknown,
)
from merge_rl.storage.convert.trajectories import (
    SHADOWS,
    arranged,
    is_average,
    named_like,
    weights_of,
    with_profile,
)
from merge_rl.storage.files import (
    is_weights_name,
    network_name,
    open_weights,
    parse_index,
)
from merge_rl.storage.pickles import (
    ByteSource,
    Span,
    StorageRef,
    TensorRef,
    read_data,
    row_major,
)

_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 4096


def extract(path: Path, weights: str = "auto", hints: Hints = NO_HINTS) -> list[Extracted]:
    """The weights in a file or folder, one result a track; CheckpointError if of no known kind."""
    if path.is_dir():
        found = _read_place(path, weights, hints)
    elif is_weights_name(path.name):
        found = _read_safetensors(path, weights, hints)
    elif path.name.endswith(INDEX):
        found = read_states(read_only_state(path), path, weights, hints)
    else:
        found = _read_pickled(path, weights, hints)
    for item in found:
        if hints.format not in ("auto", item.kind):
            raise CheckpointError(f"{path}: expected the format {hints.format}, found {item.kind}")
        if item.facts.get("adapter_as") != "products":
            require_size(item, sum(part.stat().st_size for part in files_of(path)))
    return found


def files_of(path: Path) -> list[Path]:
    """The files that a source consists of: itself, the shards of an index, those of a folder."""
    if path.is_dir():
        place = place_of(path)
        inner = [place.weights, *place.averages, *_others(path).values()] if place else []
        if place and place.kind == "distcp":
            return files_of_metadata(place.weights)
        config = [path / CONFIG] if place and place.kind == "peft" else []
        return [*config, *(part for item in inner for part in files_of(item))]
    shards = parse_index(path).values() if path.name.endswith(INDEX) else ()
    return [path, *sorted(set(shards))]


def _others(folder: Path) -> dict[str, Path]:
    """accelerate's networks beside the first one by their names: model_1, pytorch_model_2."""
    return {file.name.partition(".")[0]: file for file in sorted(folder.glob("*model_[0-9].*"))}


def _read_place(path: Path, weights: str, hints: Hints) -> list[Extracted]:
    """A folder of one checkpoint: its weights, and their averages that lie beside them."""
    place = place_of(path)
    if place is None:
        raise CheckpointError(f"{path}: no checkpoint of a known kind")
    if place.kind == "distcp":
        data, steps = read_sharded(path, place.weights)
        counted = steps or steps_of(path)
        found = read_states(data, path, weights, hints, steps=counted, whole=False)
    elif place.kind == "deepspeed":
        found = _read_pickled(place.weights, weights, hints)
        found = [
            replace(i, path=path, notes=(*i.notes, *precision_note(place.weights, i.tensors)))
            for i in found
        ]
    elif place.kind == "peft":
        found = [_read_adapter(path, place.weights, hints)]
    else:
        others = _others(path)
        if chosen := others.pop(hints.part or "", None):
            place, hints = place._replace(weights=chosen), replace(hints, part=None)
        known, lacking = _read_known(place, weights, hints)
        if known:
            batch, steps = hints.images_per_step or DEFAULT_BATCH, steps_of(path)
            nimg = None if steps is None else steps * batch
            return [
                replace(i, path=path, nimg=nimg, stem=path.name, kind=place.kind) for i in known
            ]
        data = dict(_tensors_of(place.weights))
        averages, left = _averages(place, data)
        left += [*lacking, *(f"left the network {name} (--part {name})" for name in others)]
        data = {"model": data, **averages} if averages else data
        config = None if library_document(path) else first_config(place.weights, {}, None)
        found = read_states(data, path, weights, hints, config, steps=steps_of(path))
        found = [replace(item, notes=(*item.notes, *left)) for item in found]
    stem = path.name.removesuffix(".ckpt")  # as Lightning calls folders too
    return [replace(item, stem=stem, kind=place.kind) for item in found]


def _read_known(place: Place, weights: str, hints: Hints) -> tuple[list[Extracted], list[str]]:
    """(the networks of diffusers in a place, none where they cannot be built here; why not)."""
    document = library_document(place.weights.parent)
    if document is None or not is_network_config(document) or hints.network:
        return [], []
    try:  # trainings save a network without its scheduler, which merging does not need
        network_config(document, place.weights.parent)
    except CheckpointError as error:
        return [], [str(error).partition(": ")[2]]
    files = [place.weights, *(place.averages if place.kind == "diffusers" else ())]
    found = [read_library(file, _tensors_of(file), weights, hints) or [] for file in files]
    return [item for items in found for item in items], []


def _averages(place: Place, weights: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """({"ema": the average's tensors} or {}, a sentence for each file without one)."""
    found: dict[str, Any] = {}
    left = []
    # A safetensors file keeps no order, in which an average without names would lie.
    order = {} if is_weights_name(place.weights.name) else weights
    for file in place.averages:
        data: Any = _tensors_of(file) if is_weights_name(file.name) else read_data(file)
        kept = data if isinstance(data, dict) else {}
        held, listed = hold(kept, TensorRef), next((kept[k] for k in SHADOWS if k in kept), None)
        averages = held.among(averaged=True)
        named = kept if place.kind == "diffusers" else None
        states = [held.states[averages[0]]] if averages else held.states.values()
        alike = filter(None, (_under_names(state, weights) for state in states))
        if averages:
            named = next(alike, held.states[averages[0]])
        elif named is None:
            named = next(alike, None) or named_like(listed, order)
        if named and "ema" not in found:
            found["ema"] = named
        else:
            why = "in which no average by the names of the weights is"
            if listed and not order:
                why = "whose average is a list in the order of the weights, which safetensors lose"
            left.append(f"left {file.name}, {why}")
    return found, left


def _under_names(state: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any] | None:
    """The tensors by the names of the weights, with what wraps those; None where these differ."""
    names = names_for(state, weights)
    return (
        {name: state[names[name]] for name in weights} if names.keys() == weights.keys() else None
    )


def _read_adapter(path: Path, file: Path, hints: Hints) -> Extracted:
    config, tensors = adapter_config(path), _tensors_of(file)
    products = hints.adapters == "products"
    tensors = as_products(tensors, config, path) if products else as_factors(tensors, path)
    steps, batch = steps_of(path), hints.images_per_step or DEFAULT_BATCH
    return Extracted(
        path=path, tensors=tensors, config={}, stem=path.name,
        nimg=None if steps is None else steps * batch, facts=facts_of(config, hints.adapters),
        notes=notes_of(tensors, hints.adapters),
    )  # fmt: skip


def fingerprint(path: Path) -> str:
    """SHA-256 of each file's size and of 64 samples of 4 KiB, evenly spaced from start to end.

    Tells apart files of the same name and size without reading gigabytes; no proof of equality.
    """
    digest = hashlib.sha256()
    for source in map(ByteSource, files_of(path)):
        digest.update(source.size.to_bytes(8, "little"))
        length = min(_SAMPLE_BYTES, source.size)
        for i in range(_SAMPLES):
            digest.update(source.read((source.size - length) * i // (_SAMPLES - 1), length))
    return digest.hexdigest()


def _read_pickled(path: Path, weights: str, hints: Hints) -> list[Extracted]:
    require_no_optimizer(path)
    data = by_place(read_data(path))
    if not isinstance(data, dict):
        raise unknown(data, path)
    if "param_groups" in data and "state" in data:
        raise CheckpointError(f"{path}: the state of an optimizer, and no weights of a network")
    require_whole(data, path)
    if "pytorch-lightning_version" in data and isinstance(data.get("module"), dict):
        data["state_dict"] = data.pop("module")  # of Lightning's DeepSpeed strategy
    if is_composer(data):
        read = read_states(of_composer(data), path, weights, hints, whole=False)
        return [replace(item, kind="composer") for item in read]
    if is_average(data, path):
        if weights == "model":
            raise CheckpointError(f"{path}: holds an average, no raw weights")
        read = read_states(weights_of(data, path), path, "auto", hints)
        return [replace(with_profile(item, data, hints), kind="posthoc-ema") for item in read]
    if is_lightning(data):
        read = read_states(arranged(data), path, weights, hints, whole=False)
        return [replace(item, kind="lightning") for item in read]
    if edm2_source.is_snapshot(data):
        if weights == "model":
            raise CheckpointError(f"{path}: a network snapshot holds an EMA, no raw weights")
        return [edm2_source.read_snapshot(data, path)]
    if edm2_source.is_training_state(data):
        return edm2_source.read_training_state(data, path, weights)
    if networks := edm2_source.without_modules(data, path):
        read = read_states(networks, path, weights, hints)
        images = edm2_source.images_named(path.stem)
        return [replace(item, nimg=item.nimg or images) for item in read]
    if hints.part is not None or holds_states(data):
        return read_states(data, path, weights, hints)
    raise unknown(data, path)


def _read_safetensors(path: Path, weights: str, hints: Hints) -> list[Extracted]:
    """Weights that have the right form already, be it in shards; what they say of themselves."""
    metadata = open_weights(path).metadata
    config = metadata_config(path, metadata)
    named = _tensors_of(path)
    library = read_library(path, named, weights, hints) if config is None else None
    if library is not None:
        return library
    listed = find_listing(path)
    config = first_config(path, metadata, listed[0] if listed else None)
    found = read_states(named, path, weights, hints, config)
    facts = recorded_facts(listed) if len(found) == 1 else {}
    return [replace(item, stem=network_name(path), **facts) for item in found]


def _tensors_of(path: Path) -> dict[str, TensorRef]:
    """The tensors of a file by name: of a safetensors, of shards, or of a pickled state dict."""
    if not is_weights_name(path.name):
        return read_only_state(path)
    stored = open_weights(path)
    sources = {file: ByteSource(file) for file in stored.parts}
    tensors = {}
    for name, info in stored.tensors.items():
        home = stored.homes[name]
        span = Span(sources[home], stored.parts[home].begins[name], info.nbytes)
        storage = StorageRef(info.code, math.prod(info.shape), span)
        tensors[name] = TensorRef(storage, 0, info.shape, tuple(row_major(info.shape)))
    return state_dict(tensors, str(path))
