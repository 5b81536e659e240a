"""State dicts under the names that wrappers give them, and which of them are averages.

What compiles, spreads or averages a network holds it as a part of its own, so that names of
tensors grow by that part's name; training programs keep raw weights and their average side by side.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, TypeGuard, TypeVar

T = TypeVar("T")

# Compiled modules, shards and checkpoints of activations: anywhere in a name.
_INNER: Final = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Data parallel and averaged models, and programs that hold the network as an attribute.
RAW: Final = (
    *("model", "module", "net", "network", "state_dict", "model_state_dict", "net_state_dict"),
    "online_model",
)
AVERAGED: Final = (
    *("ema", "model_ema", "ema_model", "net_ema", "ema_net", "ema_state_dict", "model_ema_state"),
    *("model_ema1", "model_ema2", "params_ema", "ema_params", "ema_weights", "G_ema", "shadow"),
    *("shadow_params", "state_dict_ema", "model_ema_state_dict", "ema_model_state_dict"),
    *("swa_state_dict", "averaged_model", "swa_model", "emas", "ema_models", "model_emas"),
)
# As a word, with a decay after it or not: generator_ema, ema_state, ema2; no optimizer's.
_EMA: Final = re.compile(r"(?!.*optim)(.+_)?ema(_model)?([_-]?\d[\d.]*|_.+)?", re.IGNORECASE)
_NUMBER: Final = re.compile(r"\d+(\.\d+)?(e-\d+)?")
_KNOWN: Final = (*RAW, *AVERAGED)
_MOST_LEVELS: Final = 4


def unwrapped(tensors: Mapping[str, T], known: Collection[str] = _KNOWN) -> dict[str, T]:
    """The tensors without what wrappers added to all of their names.

    `_orig_mod.` and its like go wherever they stand; `module.`, `model.`, `net.` and the other
    `known` ones go from the front, one after another, while all names begin alike. Names stay as
    they are where two would become one.
    """
    names = {name: _plain(name) for name in tensors}
    while len(firsts := {name.partition(".")[0] for name in names.values()}) == 1:
        wrapper = f"{firsts.pop()}."
        alike = all(name.startswith(wrapper) for name in names.values())
        if wrapper[:-1] not in known or not alike:
            break
        names = {name: short.removeprefix(wrapper) for name, short in names.items()}
    if len(set(names.values())) < len(names):
        return dict(tensors)
    return {names[name]: tensor for name, tensor in tensors.items()}


def _plain(name: str) -> str:
    for part in _INNER:
        name = name.replace(part, "")
    return name


@dataclass
class Held(Generic[T]):
    """The state dicts in a mapping, by place ("" is the mapping itself), and its other entries.

    Names within are those of the networks, without wrappers.
    """

    states: dict[str, dict[str, T]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    def among(self, *, averaged: bool) -> list[str]:
        """The places of averages, or of all else."""
        return [place for place in self.states if is_average(place) == averaged]

    def beside(self, place: str) -> list[str]:
        """The other entries: state dicts by place, or by what their names begin with; the rest."""
        others = {p: [name.partition(".")[0] for name in self.states[p]] for p in self.states}
        named = [
            name for p, begin in others.items() if p != place for name in ([p] if p else begin)
        ]
        return [*dict.fromkeys(named), *self.others]


def is_average(place: str) -> bool:
    """Whether a place is that of an average of weights: "ema", "state_dict/model_ema"."""
    return any(map(_means_average, place.split("/"))) and not _is_followed(place)


def _is_followed(place: str) -> bool:
    """Whether a place is that of the raw weights which ema-pytorch keeps in an average."""
    return place.rpartition("/")[2] == "online_model"


def number_of(place: str) -> str | None:
    """Which of several averages under one key a place is: "ema/0.999" is "0.999"."""
    return next((part for part in place.split("/")[1:] if _NUMBER.fullmatch(part)), None)


def _means_average(name: object) -> bool:
    return name in AVERAGED or (isinstance(name, str) and bool(_EMA.fullmatch(name)))


def hold(data: Mapping[str, object], kind: type[T], *, whole: bool = False) -> Held[T]:
    """The state dicts of tensors of a `kind` in a mapping, and the keys that are none.

    State dicts are looked for under the names that training programs use, within one another too;
    under any name where raw weights have none of those.
    One flat mapping may hold several, told apart by what their names begin with; what is far
    smaller than the largest is none: a count of averages, a loss. `whole` keeps a flat mapping
    without an average as it is, but for `module.`: networks call their own parts `model` or `net`.
    """
    held: Held[T] = Held()
    _collect(data, kind, "", held, whole)
    if not held.among(averaged=False):
        for name, item in data.items():
            if name in held.others and isinstance(item, Mapping) and _names_parts(item):
                held.others.remove(str(name))
                _collect(item, kind, str(name), held, whole)
    most = max(map(len, held.states.values()), default=0)
    nested = any(isinstance(data.get(place.partition("/")[0]), Mapping) for place in held.states)
    parts = {"": 1} if nested else {}  # loose beside a state dict: a generator's state, losses
    _restore_names(held)
    _drop_copies(held)
    _drop_foreign(held)
    few = [p for p, state in held.states.items() if parts.get(p, 4) * len(state) < most]
    for place in few:
        small = held.states.pop(place)
        held.others = [_joined(place, name) for name in small][:3] + held.others  # before settings
    return held


def own_names(names: Collection[str]) -> dict[str, str]:
    """What a network calls its tensors -> what a file calls them, wrappers and all.

    Of raw weights and their average in one file the average's; every name is its own where it
    cannot be told which state dict is meant.
    """
    held = hold({name: name for name in names}, str)
    places = held.among(averaged=True) or held.among(averaged=False)
    return held.states[places[0]] if len(places) == 1 else {name: name for name in names}


def names_for(found: Collection[str], wanted: Collection[str]) -> dict[str, str]:
    """What a network calls its tensors -> what a file calls them, if these meet.

    They may be equal, or differ by what wrappers add: to the file's names, or to the network's,
    which may be a wrapper itself; or by what all names of either begin with. Where they do not meet
    every name of the file is its own.
    """
    own = {name: name for name in found}
    wrapper = {name: name for name in wanted}
    inner = [wrapper, unwrapped(wrapper), *_without_beginnings(wrapper)]
    for names in (own, unwrapped(own), own_names(found), *_without_beginnings(own)):
        for short in inner:
            if names.keys() == short.keys():
                return {short[name]: known for name, known in names.items()}
    return own


def begin_alike(names: Collection[str]) -> bool:
    """Whether all names begin with the same part."""
    return len({name.partition(".")[0] if "." in name else "" for name in names}) == 1


def _without_beginnings(names: dict[str, str]) -> Iterator[dict[str, str]]:
    """The names without the part that all of them begin with, and again until they differ."""
    while names and all("." in name for name in names) and begin_alike(names):
        names = {name.partition(".")[2]: known for name, known in names.items()}
        yield names


def _restore_names(held: Held[T]) -> None:
    """Averages whose names lost their dots, as latent-diffusion's, get those of the raw weights.

    They lack what is not trained, which is the raw weights' own.
    """
    for place in held.among(averaged=True):
        average = held.states[place]
        if any("." in name for name in average):
            continue
        for raw in held.among(averaged=False):
            names = {name.replace(".", ""): name for name in held.states[raw]}
            if len(average.keys() & names.keys()) > len(names) // 2:
                known = {names[name]: item for name, item in average.items() if name in names}
                held.states[place] = {**held.states[raw], **known}
                break


def _drop_copies(held: Held[T]) -> None:
    """Leave raw weights that an average holds of its own where they lie elsewhere, too."""
    for place in [p for p in held.states if _is_followed(p)]:
        if any(
            p != place and held.states[p].keys() == held.states[place].keys()
            for p in held.among(averaged=False)
        ):
            del held.states[place]
            held.others.append(place)


def _drop_foreign(held: Held[T]) -> None:
    """Leave what a word alone calls an average, and has no name of the raw weights: another's."""
    raw = [held.states[place] for place in held.among(averaged=False)]
    for place in held.among(averaged=True):
        told = any(part in AVERAGED for part in place.split("/"))
        if raw and not told and all(held.states[place].keys().isdisjoint(one) for one in raw):
            del held.states[place]
            held.others.append(place)


def _names_parts(data: Mapping[object, object]) -> bool:
    """Whether keys are the names of tensors in parts of a network."""
    return any(isinstance(key, str) and "." in key for key in data)


def _collect(
    data: Mapping[str, object], kind: type[T], place: str, held: Held[T], whole: bool
) -> None:
    # From files of others: not every key need be text.
    flat = {k: item for k, item in data.items() if isinstance(item, kind) and isinstance(k, str)}
    for inner, state in _split(flat, whole).items():
        held.states[_joined(place, inner)] = state
    for name, item in data.items():
        if name in flat:
            continue
        deep, average = place.count("/") >= _MOST_LEVELS, _means_average(name)
        several = _several(item) if average else {}
        if several and not deep:
            for number, one in several.items():
                _collect(one, kind, f"{_joined(place, name)}/{number}", held, whole)
        elif (name in RAW or average) and not deep and _may_hold(item, kind):
            _collect(item, kind, _joined(place, name), held, whole)
        else:
            held.others.append(_joined(place, str(name)))


def _may_hold(item: object, kind: type[T]) -> TypeGuard[Mapping[str, object]]:
    """Whether it is a mapping of more than settings: `ema_config` is no average."""
    inner = item.values() if isinstance(item, Mapping) else ()
    return any(isinstance(value, (kind, Mapping)) for value in inner)


def _several(item: object) -> dict[str, Mapping[str, object]]:
    """Averages of several decays: listed, or by numbers."""
    counted = dict(enumerate(item)) if isinstance(item, (list, tuple)) else item
    if not isinstance(counted, Mapping):
        return {}
    found = {str(key): value for key, value in counted.items() if isinstance(value, Mapping)}
    alike = len(found) == len(counted) and all(map(_NUMBER.fullmatch, found))
    return found if alike else {}


def _split(tensors: Mapping[str, T], whole: bool) -> dict[str, dict[str, T]]:
    """State dicts of one flat mapping by what their names begin with; "" where nothing is known."""
    counted = "n_averaged" in tensors  # torch's AveragedModel, beside its module
    if whole and not counted and not any(n.partition(".")[0] in AVERAGED for n in tensors):
        return {"": unwrapped(tensors, ("module",))} if tensors else {}
    tensors = unwrapped(tensors, RAW)
    parts: dict[str, dict[str, T]] = {}
    for name, tensor in tensors.items():
        first, dot, rest = name.partition(".")
        known = bool(dot) and first in _KNOWN
        parts.setdefault(first if known else "", {})[rest if known else name] = tensor
    found: dict[str, dict[str, T]] = {}
    for part, state in parts.items():
        inner = _split(state, whole) if part else {"": state}
        found |= {_joined(part, place): own for place, own in inner.items()}
    return found


def _joined(place: str, name: str) -> str:
    return "/".join(part for part in (place, name) if part)
