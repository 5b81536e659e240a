"""State dicts of any family: bare, wrapped, or raw weights and their average beside others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from merge_rl.core.state_dicts import Held, hold, is_average
from merge_rl.errors import CheckpointError, MergeRLError
from merge_rl.storage.checkpoints import parse_stem
from merge_rl.storage.convert.contents import (
    Extracted,
    Hints,
    Said,
    plain,
    read_said,
    shapes_of,
    state_dict,
)
from merge_rl.storage.convert.edm2_shapes import is_edm2
from merge_rl.storage.convert.sit import describe_sit, is_sit
from merge_rl.storage.pickles import TensorRef

DEFAULT_BATCH: Final = 256  # images a step, in SiT's public training
_STEP: Final = re.compile(r"(?:.*[-_.])?(\d{7,9})")
_TRAINING_ONLY: Final = "projectors."  # of REPA's loss: nothing that is sampled depends on them
_REPA: Final = (
    f"left out the tensors {_TRAINING_ONLY}*, which REPA needs in training alone; its networks "
    "count time from images (0) to noise (1), SiT's the other way"
)
State = Mapping[str, TensorRef]


def holds_states(data: Mapping[str, object]) -> bool:
    """Whether data is that of a state dict, or of one or several with other things."""
    return bool(data) and bool(hold(data, TensorRef).states)


def read_states(
    data: Mapping[str, object],
    path: Path,
    weights: str,
    hints: Hints,
    config: Mapping[str, Any] | None = None,
) -> list[Extracted]:
    """The networks in a file: of raw weights and their average, "auto" takes the average.

    `config` is what the file says of its network in another way. nimg is steps * images a step:
    the steps as the file counts them, else the number in its name; images as its settings say,
    else 256. Optimizers are left alone.
    """
    held, found = hold(data, TensorRef), list[Extracted]()
    said = read_said(data if config is None else {**data, "config": config})
    for place in _wanted(held, path, weights):
        tensors = state_dict(held.states[place], f"{path}, {place}" if place else str(path))
        item = Extracted(path=path, tensors=tensors, config=config, stem=path.stem)
        item = _edm2(item) if is_edm2(shapes_of(tensors)) else _sit(item, said, hints)
        if place.partition("/")[0] in data or is_average(place):  # else names alone say the place
            track = "ema" if is_average(place) else "raw"
            item = _trained(replace(item, folder=track, track=track), said)
        left = [*(other for other in held.states if other != place), *held.others]
        if left and weights != "both":
            what = f"took {place or 'the weights'}" + " (an average)" * is_average(place)
            note = f"{what}; the file holds beside it: {', '.join(left[:8])}"
            item = replace(item, notes=(*item.notes, note))
        found.append(item)
    return found


def _wanted(held: Held[TensorRef], path: Path, weights: str) -> list[str]:
    """The places of the state dicts that are meant."""
    raw, averaged = held.among(averaged=False), held.among(averaged=True)
    known = [place for place, state in held.states.items() if _is_known(state)]
    if known:
        raw, averaged = ([p for p in places if p in known] for places in (raw, averaged))
    for places in (raw, averaged):
        if len(places) > 1:
            raise CheckpointError(
                f"{path}: holds several networks, {', '.join(places)}; expected one, or one and "
                "its average"
            )
    if [*raw, *averaged] == [""]:
        return [""]
    chosen = {"auto": averaged or raw, "both": raw + averaged, "ema": averaged, "model": raw}
    if not chosen[weights]:
        holds = " and ".join([*raw, *averaged])
        raise CheckpointError(f"{path}: holds no {weights!r}, only {holds}")
    return chosen[weights]


def _is_known(state: State) -> bool:
    shapes = shapes_of(state)
    return is_edm2(shapes) or is_sit(shapes)


def _edm2(item: Extracted) -> Extracted:
    nimg, ema_std = parse_stem(item.path.stem)
    track = None if ema_std is None else f"ema-{ema_std:.3f}"
    return replace(item, nimg=nimg, ema_std=ema_std, track=track)


def _sit(item: Extracted, said: Said, hints: Hints) -> Extracted:
    tensors = {k: t for k, t in item.tensors.items() if not k.startswith(_TRAINING_ONLY)}
    notes = (_REPA,) if len(tensors) < len(item.tensors) else ()
    try:
        config, assumed = describe_sit(shapes_of(tensors), said, hints)
    except MergeRLError as error:
        raise CheckpointError(f"{item.path}: {error}") from None
    autoencoder = "sd-vae-sit" if config["in_channels"] == 4 else None
    return replace(
        item, tensors=tensors, config=config, autoencoder=autoencoder, assumed=assumed, notes=notes
    )


def _trained(item: Extracted, said: Said) -> Extracted:
    """With what the training program kept beside the weights: settings and progress."""
    named, step = item.nimg, _STEP.fullmatch(item.path.stem)
    steps = said.steps if said.steps is not None else int(step[1]) if step else None
    notes = item.notes
    if steps is not None and said.batch is None:
        notes += (f"no batch size said; nimg takes {DEFAULT_BATCH} images a step",)
    return replace(
        item,
        nimg=named if steps is None else steps * (said.batch or DEFAULT_BATCH),
        facts={"training": plain(said.settings)} if said.settings else {},
        notes=notes,
    )
