"""Averages of weights beside their training: folders of post-hoc EMAs, and Lightning's callbacks.

A post-hoc EMA folder (ema-pytorch's `PostHocEMA`, and pytorch-posthoc-ema's) has a file
`{index}.{step}.pt` for each average and time. It does not say how wide an average is, nor how often
it was updated: the user does, and the profile in time follows (`sparse_profile`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from merge_rl.config import real_number
from merge_rl.core.state_dicts import hold
from merge_rl.errors import CheckpointError, ConfigError
from merge_rl.storage.checkpoints import MAX_EMA_STD, MIN_EMA_STD, is_ema_std
from merge_rl.storage.convert.contents import DEFAULT_BATCH, NO_HINTS, Extracted, Hints
from merge_rl.storage.convert.layouts import POSTHOC
from merge_rl.storage.pickles import ByteSource, Span, StorageRef, TensorRef, kind_of

_COUNTS: Final = ("initted", "step")
_NUMBERS: Final = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4"}
_INFINITE: Final = 65_520  # the least that float16 rounds to infinity
_DIGITS: Final = {"F16": 11, "BF16": 8, "F32": 24}  # binary, of a number that is stored so
_WIDTHS: Final = 1e-3  # relative: float16 may hold them
_STATISTICS: Final = ("running_mean", "running_var", "num_batches_tracked")
SHADOWS: Final = (
    *("ema_state_dict", "ema_weights", "ema_params", "shadow_params", "ema_model", "ema"),
    *("model_ema", "averaged_model", "average_model_state"),
)


def is_average(data: Mapping[str, object], path: Path) -> bool:
    """Whether data is that of a file of a post-hoc EMA folder."""
    return POSTHOC.fullmatch(path.name) is not None and all(
        isinstance(data.get(key), TensorRef) for key in _COUNTS
    )


def weights_of(data: Mapping[str, object], path: Path) -> dict[str, object]:
    """The state dict of an average, in a mapping that says that it is one."""
    found = {k: v for k, v in data.items() if k not in (*_COUNTS, "sigma_rel")}
    for name, value in found.items():
        # ema-pytorch stores all in one type; torch's BatchNorm counts in whole numbers.
        if str(name).endswith("num_batches_tracked") and _code(value) in _DIGITS:
            count = min(_count(value, path), _INFINITE)
            block = round(max(count, 0)).to_bytes(8, "little")
            span = Span(ByteSource(block, str(path)), 0, len(block))
            found[name] = TensorRef(StorageRef("I64", 1, span), 0, (), ())
    if not any(isinstance(value, TensorRef) for value in found.values()):
        raise CheckpointError(f"{path}: counts of an average, and no weights")
    inside = all(str(key).startswith("ema_model.") for key in found)
    return found if inside else {"ema_model": found}


def with_profile(item: Extracted, data: Mapping[str, object], hints: Hints) -> Extracted:
    """An average with its time, and its profile where its width is known.

    Raises CheckpointError where the file's step is another than its name says. A step that float16
    cannot hold is infinite: then the name counts.
    """
    named = POSTHOC.fullmatch(item.path.name)
    if named is None:
        raise CheckpointError(f"{item.path}: expected a name such as 0.1000.pt")
    index, step = int(named["index"]), int(named["step"])
    counted = _count(data["step"], item.path)
    late = not any(str(key).startswith("ema_model.") for key in data)
    notes, steps = item.notes, step
    if not (counted == math.inf and _code(data["step"]) == "F16" and step >= _INFINITE):
        digits = _DIGITS.get(_code(data["step"]), 53)
        same = abs(counted - step) <= step * 2.0**-digits
        if not same and not (late and 0 < counted < step):
            raise CheckpointError(
                f"{item.path}: its name says step {step}, the file itself step {counted:g}"
            )
        if not same:  # which begin late, and count from there
            steps = round(counted)
            notes += (f"averages that begin after {step - steps} steps; nimg counts from there",)
    batch = hints.images_per_step or DEFAULT_BATCH
    width = _width(index, data.get("sigma_rel"), item.path, hints)
    profile: dict[str, Any] = {}
    told = "no width said (--ema-std), so that no EMA can be rebuilt from it"
    if width is not None:
        profile, told = _profile(width, hints, batch)
    if not hints.images_per_step:
        notes += (f"no batch size said; nimg takes {batch} images a step (--images-per-step)",)
    notes += (f"average {index}: {told}",)
    return replace(
        item, stem=f"step-{step}-ema-{index}", folder="", track=f"ema-{index}",
        nimg=steps * batch, notes=notes, width=width, **profile,
    )  # fmt: skip


def require_one_width(found: Sequence[Extracted], hints: Hints = NO_HINTS) -> None:
    """Refuse averages of one index, which are one average at several times, of several widths.

    And a word on widths where there are no such averages.
    """
    first: dict[str | None, Extracted] = {}
    said = "--ema-std" if hints.ema_std else "--update-every" if hints.update_every else None
    if said and not any(item.kind == "posthoc-ema" for item in found):
        raise ConfigError(
            f"{found[0].path}: no post-hoc EMA, of which {said} says the profile; expected files "
            "such as 0.1000.pt"
        )
    for item in (item for item in found if item.kind == "posthoc-ema"):
        other = first.setdefault(item.track, item)
        here, there = (one.width or math.nan for one in (item, other))
        if item.width != other.width and not abs(here - there) <= _WIDTHS * there:
            texts = ["none" if one.width is None else f"{one.width:g}" for one in (item, other)]
            raise CheckpointError(
                f"{item.path}: says the width {texts[0]}, expected {texts[1]} as in {other.path}, "
                "an average of the same index (--ema-std says one for all)"
            )


def _profile(width: float, hints: Hints, batch: int) -> tuple[dict[str, Any], str]:
    """(fields of the profile, a sentence) of an average that was to be `width` wide."""
    from merge_rl.core.merging.ema_profiles import (
        exponent_from_std,
        sparse_profile,
        std_from_exponent,
    )

    every = hints.update_every
    if every is None:
        raise ConfigError(
            "the files do not say how often their averages were updated, which makes their width; "
            "expected --update-every (by default 100 in ema-pytorch, 10 in pytorch-posthoc-ema)"
        )
    gamma, start = sparse_profile(exponent_from_std(width), every)
    fields: dict[str, Any] = {"ema_start": start * batch}
    if gamma > 0 and std_from_exponent(gamma) < MAX_EMA_STD:
        fields["ema_std"] = width if every == 1 else std_from_exponent(gamma)
        told = f"is an EMA of width {fields['ema_std']:.4f}"
    else:
        fields["ema_gamma"] = gamma
        told = f"is wider than any ema_std, of exponent {gamma:.4f}"
    often = "each step" if every == 1 else f"every {every} steps"
    return fields, f"width {width:g}, updated {often}, {told}"


def _width(index: int, stored: object, path: Path, hints: Hints) -> float | None:
    told = parse_widths(hints.ema_std) if hints.ema_std else {}
    inside = _count(stored, path) if isinstance(stored, TensorRef) else real_number(stored)
    if told and index not in told:
        listed = ", ".join(map(str, sorted(told)))
        raise ConfigError(f"{path}: --ema-std says no width of average {index}, only of {listed}")
    width = told.get(index, inside)
    if width is None or not math.isfinite(width):
        return None
    if not is_ema_std(width):
        expected = f"{MIN_EMA_STD} to {MAX_EMA_STD}"
        raise CheckpointError(f"{path}: expected a width of {expected}, found {width:g}")
    if inside is not None and abs(width - inside) > _WIDTHS * width:
        raise ConfigError(f"{path}: --ema-std says {width:g}, the file itself {inside:g}")
    return float(width)


def parse_widths(text: str) -> dict[int, float]:
    """Widths by index: "0:0.05,1:0.28", or "0.05,0.28" in the order of the indices."""
    found: dict[int, float] = {}
    for place, part in enumerate(text.replace(",", " ").split()):
        index, colon, width = part.rpartition(":")
        number = real_number(width)
        key = place if not colon else int(index) if index.isdecimal() else None
        if number is None or key is None or key in found or not is_ema_std(number):
            raise ConfigError(
                'expected --ema-std as "0:0.05,1:0.28" or "0.05,0.28", widths between '
                f"{MIN_EMA_STD} and {MAX_EMA_STD}, got {text!r}"
            )
        found[key] = number
    if not found:
        raise ConfigError(f'expected --ema-std as "0:0.05,1:0.28" or "0.05,0.28", got {text!r}')
    return found


def arranged(data: Mapping[str, object]) -> dict[str, object]:
    """A Lightning checkpoint with its average, if it has one, where averages are looked for.

    `WeightAveraging` puts the average in the place of the weights, other callbacks keep it among
    their own state, by name or in the order of the weights.
    """
    state, found = data["state_dict"], dict(data)
    raw = found.pop("current_model_state", None)
    if isinstance(raw, dict):
        return {**found, "state_dict": raw, "ema": state}
    callbacks = data.get("callbacks")
    for kept in callbacks.values() if isinstance(callbacks, dict) else ():
        # StochasticWeightAveraging has the first weights there until it begins.
        begun = isinstance(kept, dict) and kept.get("n_averaged") != 0
        for key in SHADOWS if begun else ():
            named = named_like(kept.get(key), state if isinstance(state, dict) else {})
            if named:
                return {**found, "ema": named}
    return found


def named_like(average: object, weights: Mapping[Any, object]) -> dict[Any, object] | None:
    """An average by the names of the weights; None for what is none of them.

    One without names has the order of the weights, of which it may lack some (buffers, what is not
    trained); those are then the weights' own. None too where shapes leave open which it lacks.
    """
    if isinstance(average, dict):
        inner = average.get("state_dict", average)
        held = isinstance(inner, dict) and any(isinstance(v, TensorRef) for v in inner.values())
        return inner if held else None
    if not isinstance(average, (list, tuple)) or not average:
        return None
    tensors = {name: t for name, t in weights.items() if isinstance(t, TensorRef)}
    values = [value for value in average if isinstance(value, TensorRef)]
    if len(values) < len(tensors):  # of batch norms, which have the shapes of what is trained
        trained = {k: t for k, t in tensors.items() if not str(k).endswith(_STATISTICS)}
    else:
        trained = tensors
    names = _in_order(trained, values)
    few = 2 * len(values) <= len(tensors)  # of another network
    if names is None or few or len(values) < len(average):
        return None
    return {**tensors, **dict(zip(names, values, strict=True))}


def _in_order(tensors: Mapping[Any, TensorRef], values: Sequence[TensorRef]) -> list[Any] | None:
    """The names of values that follow one another as the tensors do; None if not one way alone."""

    def first_fit(names: list[Any], wanted: Sequence[TensorRef]) -> list[Any]:
        left = iter(names)
        fits = (next((n for n in left if tensors[n].shape == v.shape), None) for v in wanted)
        return list(fits)

    early = first_fit(list(tensors), values)
    late = first_fit(list(tensors)[::-1], values[::-1])[::-1]
    return early if early == late and None not in early else None


def with_listed(data: Mapping[str, object], *, ordered: bool = True) -> Mapping[str, object]:
    """Data with the average by name that it has in the order of its raw weights (torch-ema's).

    A module that averages (flow_matching's `EMA`) numbers those beside the weights that it follows,
    which tells which is which where the file keeps the weights in their order (`ordered`).
    """
    held = hold(data, TensorRef)
    raw, averages = held.among(averaged=False), held.among(averaged=True)
    if len(raw) != 1:
        return data
    weights = held.states[raw[0]]
    if len(averages) == 1 and ordered:
        counted = held.states[averages[0]]
        listed = [counted[name] for name in map(str, range(len(counted))) if name in counted]
        named = named_like(listed, weights) if len(listed) == len(counted) else None
        return {**data, raw[0].partition("/")[0]: weights, "ema": named} if named else data
    for key in SHADOWS if not averages else ():
        item = data.get(key)
        if isinstance(item, dict):
            item = next((item[k] for k in SHADOWS if k in item), None)
        named = named_like(item, weights) if isinstance(item, (list, tuple)) else None
        if named:
            return {**data, "ema": named}
    return data


def _code(value: object) -> str:
    return value.info.code if isinstance(value, TensorRef) else ""


def _count(value: object, path: Path) -> float:
    """The number in a tensor of one element."""
    if not isinstance(value, TensorRef) or math.prod(value.shape) != 1:
        found = str(value.info) if isinstance(value, TensorRef) else kind_of(value)
        raise CheckpointError(f"{path}: expected one number as step or width, found {found}")
    data, code = b"".join(value.pieces(64)), value.info.code
    if code == "BF16":  # the upper half of a float32
        data, code = b"\0\0" + data, "F32"
    if code not in _NUMBERS:
        raise CheckpointError(f"{path}: expected one number as step or width, found {value.info}")
    return float(np.frombuffer(data, _NUMBERS[code])[0])
