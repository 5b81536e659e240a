"""State dicts of any family: bare, wrapped, or raw weights and their average beside others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from merge_rl import own_code, registry
from merge_rl.core.state_dicts import Held, hold, is_average, names_for, number_of
from merge_rl.errors import CheckpointError, MergeRLError
from merge_rl.storage.checkpoints import parse_stem
from merge_rl.storage.convert import sit
from merge_rl.storage.convert.contents import (
    Extracted,
    Hints,
    shapes_of,
    state_dict,
)
from merge_rl.storage.convert.families import (
    PROJECTORS,
    find_family,
    fitting,
    is_foreign,
    path_of,
    plain_latents,
    strange,
)
from merge_rl.storage.convert.metadata import Said, read_said, trained
from merge_rl.storage.convert.trajectories import with_listed
from merge_rl.storage.files import is_shard_name, is_weights_name, parse_index
from merge_rl.storage.pickles import TensorRef, read_data

State = Mapping[str, TensorRef]
INDEX: Final = ".index.json"  # of shards, be they pickled or not


def holds_states(data: Mapping[str, object]) -> bool:
    """Whether data is that of a state dict, or of one or several with other things."""
    return bool(data) and bool(hold(data, TensorRef).states)


def read_states(
    data: Mapping[str, object],
    path: Path,
    weights: str,
    hints: Hints,
    config: Mapping[str, Any] | None = None,
    steps: int | None = None,
    *,
    whole: bool = True,
) -> list[Extracted]:
    """The networks in a file: of raw weights and their average, "auto" takes the average.

    `config` is what the file says of its network in another way. nimg is steps * images a step:
    the steps as the file counts them, else `steps`, else the number in its name; images as the user
    or its settings say, else 256. Optimizers are left alone. A network of no known family keeps its
    names, unless (`whole` off) their first part is what the training program calls it.
    """
    if is_shard_name(path.name):
        raise CheckpointError(
            f"{path}: a shard of a model, expected its index ({path.suffix}{INDEX})"
        )
    if hints.part is not None:
        data = part_of(data, hints.part, path)
        if not holds_states(data):
            raise CheckpointError(
                f"{path}: holds nothing of the name {hints.part} that is a network, and no tensors "
                f"whose names begin with {hints.part}."
            )
    stated = str((config or {}).get("model"))
    if own_code.is_own(stated) and hints.network is None:
        own_code.require_allowed(stated, "network", "--network", f"{path}: its config")
        hints = replace(hints, network=stated)
    data = with_listed(data, ordered=path.is_file() and not is_weights_name(path.name))
    held, found = hold(data, TensorRef), list[Extracted]()
    if not any(map(_is_known, held.states.values())):
        held = hold(data, TensorRef, whole=whole or hints.part is not None)
    said = read_said(data if config is None else {**data, "config": config})
    for place in _wanted(held, path, weights):
        tensors = state_dict(held.states[place], f"{path}, {place}" if place else str(path))
        prefix = "" if hints.network else _prefix_of(tensors)
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        told = (f"took the tensors by their names without {prefix!r}",) if prefix else ()
        stem = path.stem.removesuffix(".bin.index").removesuffix(".pth")
        item = Extracted(path=path, tensors=tensors, config=config, stem=stem, notes=told)
        item = _described(item, _family(item, said, hints), said, hints, config)
        placed = place.partition("/")[0] in data or bool(held.among(averaged=True))
        if placed:  # else names alone say the place
            track = _track_of(place)
            item = replace(item, folder=track, track=track)
        if placed or steps is not None or hints.part is not None or hints.images_per_step:
            item = trained(item, said, hints, steps)
        left = () if weights == "both" else held.beside(place)
        found.append(replace(item, notes=(*item.notes, *_left(place, left))))
    return found


def _left(place: str, others: Sequence[str]) -> Iterator[str]:
    """What was taken of a file that holds more, and what that is."""
    if others:
        what = f"took {place or 'the weights'}" + " (an average)" * is_average(place)
        more = f" and {len(others) - 8} more" * (len(others) > 8)
        yield f"{what}; the file holds beside it: {', '.join(others[:8])}{more}"


def read_only_state(path: Path) -> dict[str, TensorRef]:
    """The tensors of a pickled file, or of all that an index lists, if these are one network's."""
    homes = parse_index(path) if path.name.endswith(INDEX) else {}
    data: dict[str, object] = {}
    for file in sorted(set(homes.values())) or [path]:
        found = read_data(file)
        data |= found if isinstance(found, dict) else {}
    if lacking := sorted(homes.keys() - data.keys()):
        raise CheckpointError(f"{path}: no shard holds {lacking[0]!r}, as the index says")
    held = hold(data, TensorRef, whole=True).states
    if len(held) != 1:
        raise CheckpointError(f"{path}: expected the tensors of one network")
    return next(iter(held.values()))


def _wanted(held: Held[TensorRef], path: Path, weights: str) -> list[str]:
    """The places of the state dicts that are meant."""
    raw, averaged = held.among(averaged=False), held.among(averaged=True)
    known = [place for place, state in held.states.items() if _is_known(state)]
    if known:
        raw, averaged = ([p for p in places if p in known] for places in (raw, averaged))
    # Beside a network under its known name lies what training alone needs: losses, encoders.
    raw, averaged = (
        [p for p in places if not any(q.startswith(f"{p}/") for q in places)]
        for places in (raw, averaged)
    )
    # What has an average is the network that is meant.
    followed = [
        p for p in raw if any(held.states[p].keys() == held.states[q].keys() for q in averaged)
    ]
    raw = followed if len(followed) == 1 else raw
    several = [place for place in averaged if _track_of(place) == "ema"]
    for places in (raw, several):
        if len(places) > 1:
            listed = ", ".join(place or "its own tensors" for place in places)
            raise CheckpointError(
                f"{path}: holds several networks, {listed}; --part NAME takes one, by its key or "
                "the beginning of names"
            )
    if [*raw, *averaged] == [""]:
        return [""]
    chosen = {"auto": averaged[:1] or raw, "both": raw + averaged, "ema": averaged, "model": raw}
    if not held.states:
        raise CheckpointError(f"{path}: holds no tensors of a network")
    if not chosen[weights]:
        holds = " and ".join([*raw, *averaged])
        raise CheckpointError(f"{path}: holds no {weights!r}, only {holds}")
    return chosen[weights]


def _track_of(place: str) -> str:
    """The series of a place: "raw", "ema", or "ema1" where a file numbers its averages (JiT)."""
    if is_average(place) and (number := number_of(place)):
        return f"ema-{number}"
    last = place.rpartition("/")[2]
    if last[-1:].isdigit():
        return last.removeprefix("model_")
    return "ema" if is_average(place) else "raw"


def _is_known(state: State) -> bool:
    return bool(fitting(shapes_of(state)))


def _prefix_of(state: State) -> str:
    """What all names begin with where the tensors of a known family follow it, else ""."""
    prefix, names = "", list(state)
    while not _is_known({name.removeprefix(prefix): state[name] for name in names}):
        inner, dot, _ = names[0].removeprefix(prefix).partition(".")
        prefix += inner + dot
        if not dot or not all(name.startswith(prefix) for name in names):
            return ""
    return prefix


def part_of(data: Mapping[str, object], part: str, path: Path) -> dict[str, object]:
    """The tensors of one part of a model, wherever in data, without its name before theirs.

    It may be a state dict under its name, or tensors whose names begin with it.
    """
    found: dict[str, object] = {}
    for key, value in data.items():
        if key == part and isinstance(value, dict):
            found |= value
            continue
        inner = part_of(value, part, path) if isinstance(value, dict) else {}
        if isinstance(value, TensorRef) and str(key).startswith(f"{part}."):
            found[str(key).removeprefix(f"{part}.")] = value
        elif inner:  # settings too, which say the images of a step
            found[key] = inner
        elif not isinstance(value, (TensorRef, dict)):
            found[key] = value
    return found


def _described(
    item: Extracted, family: str, said: Said, hints: Hints, stated: Mapping[str, Any] | None
) -> Extracted:
    """With its network: of a family, the user's own, or none that is known ({})."""
    if family == "edm2":
        return _edm2(item)
    if family:
        return _network(item, family, said, hints, stated)
    own, tensors = {}, item.tensors
    if hints.network is not None:
        own = {"model": own_code.allow_network(hints.network)}
        names = names_for(tensors, registry.build_on_meta(own).state_dict())
        tensors = {name: tensors[known] for name, known in names.items()}
    odd = strange(shapes_of(tensors))
    more = f" and {len(odd) - 1} more" * (len(odd) > 1)
    like = f" (but for {odd[0]}{more} they are a known one's)" if odd else ""
    told = () if own else (
        f"the tensors of no network that is known{like}, taken as they are; what needs to build it "
        "takes --network package.module:factory",
    )  # fmt: skip
    return replace(item, tensors=tensors, config=own, notes=(*item.notes, *told))


def _family(item: Extracted, said: Said, hints: Hints) -> str:
    shapes = shapes_of(item.tensors)
    stated = bool(item.config and item.config.get("model"))
    if hints.family is None and (hints.network or (is_foreign(shapes) and not stated)):
        return ""
    try:
        return find_family(shapes_of(item.tensors), said, item.config, item.path.stem, hints)
    except MergeRLError as error:
        raise CheckpointError(f"{item.path}: {error}") from None


def _edm2(item: Extracted) -> Extracted:
    nimg, ema_std = parse_stem(item.path.stem)
    track = None if ema_std is None else f"ema-{ema_std:.3f}"
    return replace(item, nimg=nimg, ema_std=ema_std, track=track)


def _network(
    item: Extracted, family: str, said: Said, hints: Hints, stated: Mapping[str, Any] | None
) -> Extracted:
    """With the options of its network, without what only training needs."""
    unused = (sit.ROTATIONS,) if family == "jit" else (PROJECTORS,) if family == "repa" else ()
    tensors = {k: t for k, t in sit.joined_blocks(item.tensors).items() if not k.startswith(unused)}
    kept_out = {k: t for k, t in item.tensors.items() if k.startswith(unused)}
    left = {name.partition(".")[0] for name in kept_out}
    notes = tuple(f"left out the tensors {name}.*, which no sample depends on" for name in left)
    shapes = shapes_of(tensors)
    try:
        if family == "jit":
            config, assumed = sit.describe_jit(shapes, said)
            sit.require_rotations(kept_out, config)
        else:
            config, assumed = sit.describe_sit(shapes, said, hints)
            config["model"] = family
        path = path_of(family, said.settings)
        latents = config["in_channels"] if plain_latents(said) else 0
    except MergeRLError as error:
        raise CheckpointError(f"{item.path}: {error}") from None
    if stated is not None:  # what tensors leave open, whoever built the network knows
        assumed = {key: text for key, text in assumed.items() if key not in stated}
        config |= {key: value for key, value in stated.items() if key in config}
    return replace(
        item, tensors=tensors, config=config, assumed=assumed, notes=(*item.notes, *notes),
        autoencoder="sd-vae-sit" if latents == 4 else None,
        sampler=() if path in (None, "linear") else (("path", path),),
    )  # fmt: skip
