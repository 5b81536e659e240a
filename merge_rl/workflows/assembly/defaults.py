"""Which model is meant, and what the run or set near it says: its recipe of how it is sampled."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_rl import own_code
from merge_rl.config import (
    OptimizeConfig,
    SamplerConfig,
    from_mapping,
    load_config,
    to_mapping,
)
from merge_rl.errors import CheckpointError, RunError, absent
from merge_rl.interfaces import Tracker
from merge_rl.progress import NoteTracker
from merge_rl.storage.checkpoints import (
    SetDefaults,
    has_manifest,
    left_in_file,
    newest_model,
    read_manifest,
    stated_config,
)
from merge_rl.storage.files import index_of, is_weights_name, reference_file, spellings
from merge_rl.storage.hub import GUIDE_FOLDER, RECIPE_NAME, local_place
from merge_rl.storage.runs import (
    FinetuneRun,
    Meant,
    described,
    folder_kind,
    holds_weights,
    is_finetune_run,
    only_inside,
    result_of,
)
from merge_rl.untrusted import load_yaml

if TYPE_CHECKING:
    from merge_rl.core.network import Network
    from merge_rl.workflows.assembly.networks import Announce

_PARENTS = 3  # how far above a model its set or run is looked for


_COPIED = (
    "extractor", "extractor_weights", "reference", "heldout", "autoencoder", "autoencoder_weights",
)  # fmt: skip


_FILES = {
    "reference": "reference", "heldout": "reference", "extractor_weights": "extractor",
    "autoencoder_weights": "autoencoder",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelDefaults:
    """Settings that a run or a set says of its models; None where it says nothing."""

    extractor: str | None = None
    extractor_weights: str | None = None
    reference: str | None = None
    heldout: str | None = None
    autoencoder: str | None = None
    autoencoder_weights: str | None = None
    autoencoder_dtype: str = "float32"
    sampler: SamplerConfig | None = None
    note: str | None = None  # of guidance that a search has tuned


def find_defaults(model: str | Path) -> ModelDefaults:
    """Settings of the run directory or checkpoint set that the model lies in.

    The sampler is that of the model's own recipe where guidance was searched with it.
    """
    near = _near_defaults(model)
    tuned = own_sampler(Path(model), near.sampler)
    if tuned is None:
        return near
    note = f"{model}: sampled with {guidance_text(tuned)}, which was searched with its merge"
    if tuned.guide is not None and not Path(tuned.guide).exists():
        note += f"; the guide {tuned.guide} is not here, say where with --guide (or guide=)"
    return dataclasses.replace(near, sampler=tuned, note=note)


def require_parts_of(model: str | Path, unsaid: Collection[str]) -> None:
    """Refuse code that a model, or its run or set, names and nobody here, and files that are gone.

    `unsaid` are the parts that the user leaves to it: network, guide, and fields of
    `ModelDefaults`. All code that is not allowed is told at once, and so are all files.
    """
    near = find_defaults(model)
    stated = (stated_config(model) or {}) if "network" in unsaid else {}
    guide = None if near.sampler is None else near.sampler.guide_network
    named = {
        "network": (str(stated.get("model", "")), "network", "--network"),
        "autoencoder": (near.autoencoder, "autoencoder", "--autoencoder"),
        "extractor": (near.extractor, "extractor", "--extractor"),
        "guide": (guide, "network", "--guide-network"),
    }
    asked = [named[part] for part in named if part in unsaid]
    own_code.require_all_allowed(asked, f"the run or set of {model}")
    # Weights go with the part that they are of, held-out statistics with the reference.
    files = {name: getattr(near, name) for name, of in _FILES.items() if {name, of} <= {*unsaid}}
    gone = {name: path for name, path in files.items() if path and _is_gone(path)}
    if gone:
        listed = " and ".join(f"the {name.replace('_', ' ')} {path}" for name, path in gone.items())
        flags = " ".join(f"--{name.replace('_', '-')} PATH" for name in gone)
        what, are = ("they", "are") if len(gone) > 1 else ("it", "is")
        raise RunError(
            f"the run or set of {model} names {listed}, where nothing lies any more; say where "
            f"{what} {are} with {flags}"
        )


def _is_gone(path: str) -> bool:
    """Whether a path that a run or set has written is none any more; names of the Hub are none."""
    return Path(path).is_absolute() and not reference_file(path)[0].exists()


def _near_defaults(model: str | Path) -> ModelDefaults:
    near = ([path, *path.parents][: _PARENTS + 1] for path in spellings(model))
    for folder in itertools.chain.from_iterable(near):
        if (folder / "config.yaml").is_file() and (folder / "inputs.json").is_file():
            from merge_rl.workflows.assembly.extractors import own_weights  # waits for torch

            run = load_config(OptimizeConfig, folder / "config.yaml")
            copied = {key: getattr(run, key) for key in (*_COPIED, "autoencoder_dtype", "sampler")}
            return ModelDefaults(**{**copied, "extractor_weights": own_weights(run)})
        if folder.is_dir() and has_manifest(folder):
            found = of_set(read_manifest(folder).defaults.resolved(folder), folder)
            return _with_own(found, folder) if is_finetune_run(folder) else found
    return ModelDefaults()


def _with_own(found: ModelDefaults, folder: Path) -> ModelDefaults:
    """With the code of the user's that a fine-tuning run names and its manifest leaves out."""
    run = FinetuneRun.open(folder).config()
    named = {kind: getattr(run, kind) for kind in ("extractor", "autoencoder")}
    own = {kind: name for kind, name in named.items() if name and own_code.is_own(name)}
    return dataclasses.replace(found, **own)


def of_set(found: SetDefaults, folder: Path) -> ModelDefaults:
    """What a set's manifest, in its folder, says of its models."""
    texts = {key: getattr(found, key) for key in _COPIED}
    sampler = None
    if found.sampler:
        where = f"{folder.name} manifest, defaults.sampler"
        sampler = from_mapping(SamplerConfig, dict(found.sampler), where)
    said = {key: str(value) for key, value in texts.items() if value is not None}
    return ModelDefaults(**said, sampler=sampler)


def own_sampler(model: Path, near: SamplerConfig | None) -> SamplerConfig | None:
    """The sampler that the recipe of a model, or of a run's result, names; None: it names none.

    What the recipe leaves out is that of `near`, and so is the place of a guide that was not
    merged: a recipe has its name alone.
    """
    folder = model if model.is_dir() else model.parent
    for place in (folder, folder / "merged"):
        recipe = place / RECIPE_NAME
        document = load_yaml(recipe) if recipe.is_file() else None
        said = document.get("sampler") if isinstance(document, Mapping) else None
        if isinstance(said, Mapping):
            base = {} if near is None else to_mapping(near)
            found = from_mapping(SamplerConfig, {**base, **said}, f"{recipe}, sampler")
            if found.guide == GUIDE_FOLDER:
                return dataclasses.replace(found, guide=str(place / GUIDE_FOLDER))
            if found.guide is None:
                return found
            here = near.guide if near is not None else None
            return dataclasses.replace(found, guide=here or found.guide)
    return None


def guidance_text(sampler: SamplerConfig) -> str:
    """Strength and interval in words."""
    if sampler.guidance_interval is None:
        return f"guidance {sampler.guidance:.4g}"
    low, high = sampler.guidance_interval
    return f"guidance {sampler.guidance:.4g} from {low:.4g} to {high:.4g}"


def find_model(
    path: str | os.PathLike[str], track: str | None = None, tracker: Tracker | None = None
) -> Meant:
    """The one model that `path` means.

    A run means its merged model, a fine-tuning run its result, a set its newest checkpoint (of the
    `track`, where one is named), "user/repo" the model or set of the Hub, a folder of none of these
    the only one of them in it; a model folder and a single file mean themselves. `tracker` hears of
    a download before it begins.

    Raises CheckpointError that says what was found for anything else, RunError for a run that is
    not finished.
    """
    found = _meant(path, track, tracker)
    notes = [text for text in (found.note, left_in_file(found.path)) if text]
    return Meant(found.path, "; ".join(notes) or None)


def _meant(path: str | os.PathLike[str], track: str | None, tracker: Tracker | None) -> Meant:
    place = local_place(path, track, tracker)
    if place.is_file() and is_weights_name(place.name) and not holds_weights(place):
        raise CheckpointError(f"{place}: expected a model, found statistics or features")
    index = index_of(place)
    if index is not None:
        return Meant(index, f"{path}: took {index}, the whole model")
    if not place.exists():
        raise CheckpointError(absent(path, of_hub=True))
    if not place.is_dir():
        note = f"{path}: took the model of the Hub" if not os.path.lexists(path) else None
        return Meant(place, note)
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

    Args:
        path: a model, a run (its result) or a set (its newest checkpoint). "user/repo" and
            "user/repo@revision" mean those of the Hub, unless there is such a path here; they are
            downloaded to a cache.
        network: a factory of the user's, or its name "package.module:factory": what a file's config
            names is not imported unless it is named here too. See `merge_rl.describe`.
        announce: called with a sentence where another path than `path` is taken.

    Raises CheckpointError for weights that are missing, damaged or not the network's, RunError for
    a run without a result, ConfigError for a network that cannot be built, HubError for downloads.
    """
    from merge_rl.workflows.assembly.networks import load_network

    named = None if network is None else own_code.allow_network(network)
    found = find_model(path, tracker=NoteTracker(announce))
    return load_network(found.told(announce), named)
