"""Which model is meant by a run, a set, a folder, a file, or a name of the Hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_rl import own_code
from merge_rl.errors import CheckpointError
from merge_rl.storage.checkpoints import newest_model
from merge_rl.storage.files import index_of, is_weights_name
from merge_rl.storage.hub import local_model
from merge_rl.storage.runs import (
    Meant,
    described,
    folder_kind,
    holds_weights,
    only_inside,
    result_of,
)

if TYPE_CHECKING:
    from merge_rl.core.network import Network
    from merge_rl.workflows.assembly.networks import Announce


def find_model(path: str | os.PathLike[str], track: str | None = None) -> Meant:
    """The one model that `path` means.

    A run means its merged model, a fine-tuning run its result, a set its newest checkpoint (of the
    `track`, where one is named), "user/repo" the model of the Hub, a folder of none of these the
    only one of them in it; a model folder and a single file mean themselves.

    Raises CheckpointError that says what was found for anything else, RunError for a run that is
    not finished.
    """
    place = local_model(path)
    if place.is_file() and is_weights_name(place.name) and not holds_weights(place):
        raise CheckpointError(f"{place}: expected a model, found statistics or features")
    index = index_of(place)
    if index is not None:
        return Meant(index, f"{path}: took {index}, the whole model")
    if not place.is_dir():
        note = f"{path}: took the model of the Hub" if not os.path.lexists(path) else None
        return Meant(place, note if place.exists() else None)
    folder = only_inside(place)
    kind = folder_kind(folder)
    if track is not None or kind == "set":
        chosen = newest_model(folder, track)
        name = chosen.relative_to(folder) if chosen != folder else chosen
        return Meant(chosen, f"{path}: took {name}, the newest of the set {folder}")
    if kind in ("run", "fine-tuning run"):
        chosen = result_of(folder)
        return Meant(chosen, f"{path}: took {chosen}, the result of the {kind}")
    if kind != "model":
        what = "a comparison" if kind == "comparison" else described(folder)
        raise CheckpointError(f"{folder}: expected a model, a set or a run, found {what}")
    return Meant(folder, None if folder == Path(path) else f"{path}: took the model {folder}")


def load_model(
    path: str | os.PathLike[str],
    *,
    network: str | Callable[..., Any] | None = None,
    announce: Announce = lambda _text: None,
) -> Network:
    """The network of a model folder, a .safetensors, a run or a set, float32, evaluation mode.

    `network` is a factory of the user's, or its name "package.module:factory": what a file's config
    names is not imported unless it is named here too. `merge_rl.describe` says what it returns.

    See `find_model` for which one is meant, of which `announce` hears. The text "user/repo" or
    "user/repo@revision" means a model of the Hub, unless there is such a path here; it is
    downloaded to the cache of the Hub's client.
    """
    from merge_rl.workflows.assembly.networks import load_network

    named = None if network is None else own_code.allow(network)
    return load_network(find_model(path).told(announce), named)
