"""The names that a checkpoint may contain, and what each stands for. There are no others.

A handler here sees plain values and returns plain values; no name is ever imported or called.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from merge_rl.storage.pickle_machine import Handler, Machine
from merge_rl.storage.pickle_numpy import NUMPY_NAMES
from merge_rl.storage.pickle_values import Record, is_one_of, kind_of, shown
from merge_rl.storage.torch_legacy import load_from_bytes
from merge_rl.storage.torch_storage import TENSOR_NAMES

_CLASSES: Final = (
    "argparse.Namespace",
    *(f"torch.nn.modules.container.{name}" for name in ("ModuleDict", "ModuleList", "Sequential")),
)
_DTYPES: Final = (
    *("float16", "float32", "float64", "bfloat16", "bool", "complex64"),
    *("int8", "int16", "int32", "int64", "uint8"),
)


def _mapping(args: tuple[object, ...], m: Machine) -> dict[object, object]:
    """A dict or one of its subclasses: empty, or from a list of pairs."""
    pairs = args[0] if args else []
    if len(args) > 1 or not isinstance(pairs, list):
        raise m.refuse("a mapping that is made from something other than a list of pairs")
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise m.refuse("a mapping that is made from something other than a list of pairs")
    m.budget.require_keys([key for key, _ in pairs])
    m.budget.spend(110 * len(pairs))
    return dict(pairs)


def _record(kind: str) -> Handler:
    """Instances of a class, as a record without state yet."""
    return lambda args, _: Record(kind, args)


def _persistent(args: tuple[object, ...], m: Machine) -> object:
    """An object that carries the source of its class: its name and state; the source is dropped."""
    facts = args[0] if len(args) == 1 else None
    name = facts.get("class_name") if isinstance(facts, dict) else None
    if not isinstance(facts, dict) or not isinstance(name, str):
        raise m.refuse("an object with its own source that does not say its class")
    if not is_one_of(facts.get("type"), "class"):
        raise m.refuse("an object with its own source that is not an instance of a class")
    return Record(f"persistent:{shown(name)}", (), facts.get("state"))


def _encode(args: tuple[object, ...], m: Machine) -> bytes:
    """Bytes, as protocols up to 2 write them: text in which every character is one byte."""
    if len(args) != 2 or not isinstance(args[0], str) or not is_one_of(args[1], "latin1"):
        raise m.refuse("bytes that are not written as latin1 text")
    m.budget.spend(len(args[0]))
    try:
        return args[0].encode("latin1")
    except UnicodeError:
        raise m.refuse("bytes that are not written as latin1 text") from None


def _members(args: tuple[object, ...], m: Machine) -> list[object]:
    values = args[0] if args else []
    if len(args) > 1 or not isinstance(values, (list, tuple)):
        raise m.refuse("a set that is made from something other than a list")
    m.budget.require_keys(list(values))
    m.budget.spend(110 * len(values))
    return list(values)


def _set(args: tuple[object, ...], m: Machine) -> object:
    return set(_members(args, m))


def _frozenset(args: tuple[object, ...], m: Machine) -> object:
    return frozenset(_members(args, m))


def _no_bytes(args: tuple[object, ...], m: Machine) -> bytes:
    if args:
        raise m.refuse("bytes that are made from arguments")
    return b""


def _size(args: tuple[object, ...], m: Machine) -> object:
    if len(args) != 1 or not isinstance(args[0], tuple):
        raise m.refuse("a size that is not made from a tuple")
    return args[0]


def _device(args: tuple[object, ...], m: Machine) -> str:
    if not args or not isinstance(args[0], str):
        raise m.refuse(f"a device named by {kind_of(args[0] if args else None)}")
    return args[0]


PERMITTED: Final[Mapping[str, Handler | None]] = {
    **TENSOR_NAMES,
    **NUMPY_NAMES,
    "dnnlib.util.EasyDict": _mapping,
    "collections.OrderedDict": _mapping,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch.storage._load_from_bytes": load_from_bytes,
    **{name: _record(name) for name in _CLASSES},
    "torch.Size": _size,
    "torch.device": _device,
    **dict.fromkeys(f"torch.{dtype}" for dtype in _DTYPES),
    "_codecs.encode": _encode,
    # Python 2's name for builtins, which protocols up to 2 use.
    **{f"{builtins}.set": _set for builtins in ("builtins", "__builtin__")},
    **{f"{builtins}.frozenset": _frozenset for builtins in ("builtins", "__builtin__")},
    **{f"{builtins}.bytes": _no_bytes for builtins in ("builtins", "__builtin__")},
}
