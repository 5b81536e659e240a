"""One network from disk, a model folder or one file of a set; tensors held against its config."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from merge_rl import errors, own_code, registry
from merge_rl.core.forms import network_shapes
from merge_rl.core.state_dicts import begin_alike, names_for, own_names
from merge_rl.errors import CheckpointError, ConfigError, IncompatibleCheckpointError, MergeRLError
from merge_rl.storage.checkpoints.diffusers_folder import (
    find_scheduler,
    is_network_config,
    network_config,
)
from merge_rl.storage.checkpoints.manifest import Manifest
from merge_rl.storage.checkpoints.recorded import find_listing
from merge_rl.storage.files import (
    CONVERTED,
    StoredWeights,
    TensorInfo,
    hash_weights,
    in_series,
    instead_of_weights,
    is_weights_name,
    open_weights,
    require_finite,
    require_hash,
    save_tensors,
    weights_in,
)
from merge_rl.untrusted import load_json_mapping, open_file, read_bounded

if TYPE_CHECKING:
    from torch import Tensor, nn

Config = Mapping[str, Any]
CONFIG_NAME: Final = "config.json"
CONFIG_KEY: Final = "config"  # of a safetensors file's metadata
_REPEATED: Final = ("depth", "num_blocks", "num_layers", "layers_per_block")  # a module each


class ModelFile(NamedTuple):
    """Weights of one network, its config where known, and the file's metadata."""

    weights: dict[str, Tensor]
    config: dict[str, Any] | None
    metadata: dict[str, str]


def open_model_file(path: str | os.PathLike[str]) -> ModelFile:
    """Weights and config from a folder of one model, or from one `.safetensors`.

    The folder holds one `.safetensors`, or shards with an index; the index itself will do.
    The config comes from the folder's `config.json`; for a file, from its own metadata first, then
    the `config.json` beside it, then a manifest that lists it, up to two folders higher. Weights
    are checked to be finite, and against the manifest's hash where there is one.
    """
    return _read(*_opened(path))


def open_tensors(path: str | os.PathLike[str]) -> ModelFile:
    """The same of tensors that are no network's: neither a config nor a manifest is looked for."""
    return _read(open_weights(model_file_path(path)), None, None)


def _read(stored: StoredWeights, recorded: str | None, config: dict[str, Any] | None) -> ModelFile:
    weights, digest = stored.read(hashed=recorded is not None)
    if digest is not None:
        require_hash(stored.path, digest, recorded)
    for name, tensor in weights.items():
        require_finite(stored.homes[name], name, tensor)
    return ModelFile(weights, config, dict(stored.metadata))


def check_model_file(
    path: str | os.PathLike[str],
) -> tuple[Mapping[str, TensorInfo], dict[str, Any] | None]:
    """Shapes and types, and the config, of what `open_model_file` opens, checked as it does.

    No tensor is made, so that torch is not needed.
    """
    stored, recorded, config = _opened(path)
    digest, problem = stored.check()
    require_hash(stored.path, digest, recorded)
    if problem:
        raise problem
    return stored.tensors, config


def _opened(
    path: str | os.PathLike[str],
) -> tuple[StoredWeights, str | None, dict[str, Any] | None]:
    """The headers of a model, the hash that a manifest records of it, its config."""
    file = model_file_path(path)
    listed = find_listing(file)
    stored = open_weights(file)
    config = first_config(file, stored.metadata, listed[0] if listed else None)
    recorded = listed[1].sha256 if listed else None
    return named_as_network(stored, config), recorded, config


def stated_config(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The config of `open_model_file`; what it describes is not looked at."""
    listed = find_listing(file := model_file_path(path))
    return first_config(file, open_weights(file).metadata, listed[0] if listed else None)


def left_in_file(path: str | os.PathLike[str]) -> str | None:
    """What a user should hear of a file that holds more than the network; None of any other."""
    try:
        left = _opened(path)[0].left_text
    except MergeRLError:  # whoever reads it says why
        return None
    return f"{path}: {left}" if left else None


def model_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a model's file; of shards, that of their hashes in name order."""
    return hash_weights(model_file_path(path))


def model_file_path(path: str | os.PathLike[str]) -> Path:
    """The `.safetensors`, or the index of shards, that `path` means: itself, or a folder's only."""
    given = Path(path)
    file = _only_file(given) if given.is_dir() else given
    if not file.exists():
        raise CheckpointError(errors.absent(given, of_hub=True))
    if not is_weights_name(file.name):
        open_file(file).close()  # what is none at all, or a pointer to one, is called so
        hint = "; `mergerl convert` makes one" if file.name.lower().endswith(CONVERTED) else ""
        found = f"a {file.suffix} file" if file.suffix else "one without ending"
        raise CheckpointError(f"{file}: expected a .safetensors file, found {found}{hint}")
    return file


def save_checkpoint(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Write weights atomically; NonFiniteWeightsError rather than a file of NaN.

    Metadata values that are not text are stored as JSON, so that `{"config": {...}}` can be read
    back by `open_model_file` and `open_checkpoints`.
    """
    for name, tensor in tensors.items():
        require_finite(Path(path), name, tensor)
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for key, value in (metadata or {}).items()
    }
    save_tensors(path, tensors, texts)


def folder_config(folder: Path) -> dict[str, Any] | None:
    """What a folder's `config.json` says, that of diffusers in our words; None if it is not known.

    A network of diffusers is known with its scheduler.
    """
    document = _config_document(folder)
    if document is not None and is_network_config(document):
        return network_config(document, folder) if find_scheduler(folder) else None
    return document


def library_document(folder: Path) -> dict[str, Any] | None:
    """The `config.json` of a folder that diffusers wrote, None if there is no such file."""
    document = _config_document(folder)
    of_library = document is not None and "model" not in document and "_class_name" in document
    return document if of_library else None


def _config_document(folder: Path) -> dict[str, Any] | None:
    file = folder / CONFIG_NAME
    return load_json_mapping(read_bounded(file), str(file)) if os.path.lexists(file) else None


def metadata_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The config in a safetensors file's metadata, None if there is none."""
    text = metadata.get(CONFIG_KEY)
    return None if text is None else load_json_mapping(text, f"{path}, metadata {CONFIG_KEY!r}")


def _only_file(folder: Path) -> Path:
    files = weights_in(folder)
    if len(files) != 1:
        found = f"{len(files)} .safetensors files" if files else "no .safetensors file"
        hint = "; name one of them, or merge them first" if files else instead_of_weights(folder)
        raise CheckpointError(f"{folder}: expected the folder of one model, found {found}{hint}")
    return files[0]


def first_config(
    file: Path, metadata: Mapping[str, str], manifest: Manifest | None
) -> dict[str, Any] | None:
    """The config in a file's metadata, else beside it or its series, else of its manifest."""
    config = metadata_config(file, metadata)
    for folder in (place.parent for place in [file, *takewhile(in_series, file.parents)]):
        config = folder_config(folder) if config is None else config
    if config is None and manifest is not None:
        config = dict(manifest.model) or None
    return config


def require_network(tensors: Mapping[str, TensorInfo], config: Config | None, where: str) -> None:
    """Refuse tensors that are not those of the network that `config` describes.

    Where they differ from what is known of it, or nothing is, the network is built on the meta
    device, without memory for weights, and says itself what it expects. Nothing is said where no
    config is known, or one that names no network of ours ("model" is missing). Raises
    IncompatibleCheckpointError for options that no network can have, and as `require_fit`.
    """
    if config is None or "model" not in config:
        return
    try:
        registry.require_options(config)
    except ConfigError as error:
        raise IncompatibleCheckpointError(f"{where}: {error}") from None
    shapes = {name: info.shape for name, info in tensors.items()}
    floating = all(info.is_floating for info in tensors.values())
    if floating and shapes == network_shapes(config, len(shapes)):
        return
    network = f"the {config['model']} network that its config describes"
    _require_forms(tensors, _forms(config, len(tensors), where), where, network)


def require_fit(tensors: Mapping[str, TensorInfo], network: nn.Module, where: str) -> None:
    """Refuse tensors whose names, shapes or kinds are not those of a network's own state dict.

    Raises IncompatibleCheckpointError that counts the odd tensors and describes the first.
    """
    _require_forms(tensors, _forms_of(network), where, "the network")


def _require_forms(
    tensors: Mapping[str, TensorInfo], expected: Mapping[str, TensorInfo], where: str, network: str
) -> None:
    odd = [name for name in {**expected, **tensors} if not _fits(tensors, expected, name)]
    if odd:
        wanted = expected.get(odd[0])
        found = tensors.get(odd[0], "missing")
        want = f"{wanted.kind} {list(wanted.shape)}" if wanted else "no such tensor"
        raise IncompatibleCheckpointError(
            f"{where}: not the tensors of {network}: {len(odd)} differ, first {odd[0]!r}: "
            f"found {found}, expected {want}"
        )


def named_as_network(stored: StoredWeights, config: Config | None) -> StoredWeights:
    """Weights under the names of the network of `config`; those that do not meet it stay."""
    if config is None or "model" not in config:
        return stored
    plain = all(new == old for new, old in own_names(stored.tensors).items())
    plain = plain and not begin_alike(stored.tensors)
    if plain and not own_code.is_own(str(config["model"])):  # which may hold what it wraps
        return stored
    try:
        names = names_for(stored.tensors, _forms(config, len(stored.tensors), str(stored.path)))
    except IncompatibleCheckpointError:
        return stored
    return stored if all(new == old for new, old in names.items()) else stored.renamed(names)


def _fits(tensors: Mapping[str, TensorInfo], expected: Mapping[str, TensorInfo], name: str) -> bool:
    found, wanted = tensors.get(name), expected.get(name)
    if found is None or wanted is None or found.shape != wanted.shape:
        return False
    return found.kind == wanted.kind


def _nested(config: Config) -> Config:
    """The options of a network within a config, where they have a section of their own."""
    found = config.get("network")
    return found if isinstance(found, Mapping) else {}


def _forms(config: Config, count: int, where: str) -> dict[str, TensorInfo]:
    """The network's own state dict; one far larger than `count` tensors is not even begun."""
    options = {**config, **_nested(config)}
    parts = [value for key in _REPEATED if type(value := options.get(key)) is int]
    parts += [len(value) for value in options.values() if isinstance(value, (list, tuple))]
    if max(parts, default=0) > count:
        raise IncompatibleCheckpointError(
            f"{where}: {count} tensors, but its config describes a network of {max(parts)} parts"
        )
    try:
        return _forms_of(registry.build_on_meta(config))
    except ConfigError as error:
        raise IncompatibleCheckpointError(f"{where}: {error}") from None


def _forms_of(network: nn.Module) -> dict[str, TensorInfo]:
    state = network.state_dict()
    return {name: TensorInfo.of(tuple(t.shape), t.dtype) for name, t in state.items()}
