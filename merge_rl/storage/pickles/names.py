"""The names that a checkpoint may contain, and what each stands for. There are no others.

A handler here sees plain values and returns plain values; no name is ever imported or called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from merge_rl.storage.pickles.machine import Handler, Machine, Record, Unbuilt
from merge_rl.storage.pickles.spans import Span
from merge_rl.storage.pickles.tensors import DTYPES, TENSOR_NAMES, load_from_bytes
from merge_rl.storage.pickles.values import Global, is_one_of, kind_of, shown, whole_numbers

_CLASSES: Final = (
    "argparse.Namespace",
    "datetime.timedelta",
    "torch.torch_version.TorchVersion",
    "types.SimpleNamespace",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "ml_collections.config_dict.config_dict.ConfigDict",
    "ml_collections.config_dict.config_dict.FieldReference",
    *(f"torch.nn.modules.container.{name}" for name in ("ModuleDict", "ModuleList", "Sequential")),
)
_DISTRIBUTED: Final = (  # of torch.distributed.checkpoint
    *(f"metadata.{name}StorageMetadata" for name in ("Tensor", "Chunk", "Bytes")),
    *("metadata.Metadata", "metadata.MetadataIndex", "metadata.StorageMeta"),
    *("metadata.TensorProperties", "metadata._MEM_FORMAT_ENCODING", "filesystem._StorageInfo"),
)
_ATTRIBUTES: Final = (  # dicts of settings, as Lightning's releases call them
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
_SETTINGS: Final = (
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Float", "Integer", "String")),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Bytes", "Path", "Enum")),
)
_PATHS: Final = ("pathlib", "pathlib._local")  # of Python 3.13
_TYPES: Final = ("dict", "list", "tuple", "int", "long", "float", "bool", "str")


PERSISTENT_VERSION: Final = 6  # of the records that the official EDM2 programs write


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


class _Setting(Record):
    """A node of OmegaConf: its content alone, without its parent, in which it lies itself."""

    def build(self, state: object, machine: Machine) -> object:
        if not isinstance(state, dict):
            raise machine.refuse(f"the state of a {self.kind} is {kind_of(state)}")
        content = {key: state[key] for key in ("_content", "_val") if key in state}
        return super().build(content, machine)


def _setting(kind: str) -> Handler:
    return lambda args, _: _Setting(kind, args)


def _default_mapping(args: tuple[object, ...], m: Machine) -> dict[object, object]:
    """A defaultdict: its default is left out, its items follow."""
    if len(args) > 1 or not (not args or args[0] is None or isinstance(args[0], Global)):
        raise m.refuse("a mapping with a default that is not a class")
    return {}


def _counter(args: tuple[object, ...], m: Machine) -> dict[object, object]:
    """Counts by key, as schedules of learning rates keep them."""
    if len(args) > 1 or not all(isinstance(arg, dict) for arg in args):
        raise m.refuse("counts that are not made from a mapping")
    return {key: value for arg in args if isinstance(arg, dict) for key, value in arg.items()}


def _path(args: tuple[object, ...], m: Machine) -> str:
    """A path as text; nothing is looked up."""
    if not all(isinstance(part, str) for part in args):
        raise m.refuse("a path of parts that are not text")
    m.budget.spend(sum(len(str(part)) for part in args))
    return str(PurePosixPath(*map(str, args)))


def _persistent(args: tuple[object, ...], m: Machine) -> object:
    """An object that carries the source of its class: its name and state; the source is dropped."""
    facts = args[0] if len(args) == 1 else None
    name = facts.get("class_name") if isinstance(facts, dict) else None
    if not isinstance(facts, dict) or not isinstance(name, str):
        raise m.refuse("an object with its own source that does not say its class")
    if not is_one_of(facts.get("type"), "class"):
        raise m.refuse("an object with its own source that is not an instance of a class")
    version = facts.get("version")
    if type(version) is not int or version != PERSISTENT_VERSION:
        found = version if type(version) is int else kind_of(version)
        raise m.refuse(
            f"an object with its own source in version {found} of its format, "
            f"expected {PERSISTENT_VERSION}"
        )
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


def _dtype(args: tuple[object, ...], m: Machine) -> object:
    code = args[0] if args else None
    if not isinstance(code, str) or code not in _CODES:
        what = shown(code) if isinstance(code, str) else kind_of(code)
        raise m.refuse(f"an array of type {what}, expected plain numbers")
    return _DType(code)


def _from_buffer(args: tuple[object, ...], m: Machine) -> object:
    if len(args) != 4 or not is_one_of(args[3], "C", "F"):
        raise m.refuse("an array without bytes, type, shape and order")
    return _array(m, args[0], args[1], args[2], str(args[3]))


def _reconstruct(args: tuple[object, ...], m: Machine) -> object:
    kind = args[0] if args else None
    if not isinstance(kind, Global) or kind.name != "numpy.ndarray":
        raise m.refuse("an array of a class other than numpy.ndarray")
    return _Array()


def _scalar(args: tuple[object, ...], m: Machine) -> object:
    if len(args) != 2:
        raise m.refuse("a number without type and bytes")
    return _array(m, args[1], args[0], (), "C").item()


NUMPY_NAMES: Final[Mapping[str, Handler | None]] = {
    "numpy.ndarray": None,
    "numpy.dtype": _dtype,
    # numpy 2 renamed numpy.core.
    **{f"numpy.{core}.multiarray._reconstruct": _reconstruct for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
}


PERMITTED: Final[Mapping[str, Handler | None]] = {
    **TENSOR_NAMES,
    **NUMPY_NAMES,
    "dnnlib.util.EasyDict": _mapping,
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": _default_mapping,
    "collections.Counter": _counter,
    **dict.fromkeys(_ATTRIBUTES, _mapping),
    **{name: _record(name) for name in (f"torch.distributed.checkpoint.{n}" for n in _DISTRIBUTED)},
    "torch.serialization._get_layout": _record("layout"),
    "easydict.EasyDict": _mapping,
    "typing.Any": None,
    **{f"{module}.{kind}Path": _path for module in _PATHS for kind in ("Posix", "Windows")},
    **{f"{module}.Pure{kind}Path": _path for module in _PATHS for kind in ("Posix", "Windows")},
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch.storage._load_from_bytes": load_from_bytes,
    **{name: _record(name) for name in _CLASSES},
    **{name: _setting(name) for name in _SETTINGS},
    "torch.Size": _size,
    "torch.device": _device,
    **dict.fromkeys(DTYPES),
    "_codecs.encode": _encode,
    # Python 2's name for builtins, which protocols up to 2 use.
    **{f"{builtins}.set": _set for builtins in ("builtins", "__builtin__")},
    **{f"{builtins}.frozenset": _frozenset for builtins in ("builtins", "__builtin__")},
    **{f"{builtins}.bytes": _no_bytes for builtins in ("builtins", "__builtin__")},
    # Types of settings, which are named and never made.
    **{f"{b}.{kind}": None for b in ("builtins", "__builtin__") for kind in _TYPES},
}

_CODES: Final = frozenset(
    ["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"]
)


class _DType(Unbuilt):
    """A dtype of plain numbers: its code first, the byte order with its state."""

    def __init__(self, code: str) -> None:
        super().__init__()
        self.code, self.order = code, "|"

    def build(self, state: object, machine: Machine) -> object:
        """Accept (version, byte order, nothing about fields...)."""
        order = state[1] if isinstance(state, tuple) and len(state) >= 5 else None
        plain = isinstance(state, tuple) and all(part is None for part in state[2:5])
        if not plain or not is_one_of(order, "<", ">", "|", "="):
            raise machine.refuse(f"an array of {self.code} has a type that is not plain numbers")
        self.order = str(order)
        return self

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(f"{'>' if self.order == '>' else '<'}{self.code}")


class _Array(Unbuilt):
    """An array that awaits its content."""

    def build(self, state: object, machine: Machine) -> object:
        """The array for (version, shape, dtype, column-major, bytes)."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise machine.refuse("an array without shape, type and bytes")
        _, shape, dtype, column_major, data = state
        return _array(machine, data, dtype, shape, "F" if column_major is True else "C")


def _array(
    m: Machine, data: object, dtype: object, shape: object, order: str
) -> npt.NDArray[np.generic]:
    """A read-only view of the bytes."""
    if not isinstance(dtype, _DType):
        raise m.refuse(f"an array of {kind_of(dtype)}, expected plain numbers")
    if not isinstance(data, (bytes, Span)):
        raise m.refuse(f"the content of an array is {kind_of(data)}, expected bytes")
    sizes = whole_numbers(shape)
    if sizes is None:
        raise m.refuse("an array whose shape is not a few whole numbers")
    found = dtype.dtype
    if math.prod(sizes) * found.itemsize != len(data):
        raise m.refuse(f"an array of shape {sizes} and type {found} in {len(data)} bytes")
    m.budget.spend(400)
    flat: npt.NDArray[np.generic] = np.frombuffer(bytes(data), dtype=found)
    return flat.reshape(sizes, order="F" if order == "F" else "C")
