"""Tensors of a torch file as references: type, shape and place; their bytes stay in the file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from merge_rl.errors import CheckpointError
from merge_rl.late import torch
from merge_rl.storage.files import CODES, TensorInfo
from merge_rl.storage.pickles.machine import Handler, Machine, Permitted
from merge_rl.storage.pickles.opcodes import run
from merge_rl.storage.pickles.spans import ByteSource, Cursor, Span
from merge_rl.storage.pickles.values import Budget, Global, is_one_of, kind_of, shown, whole_numbers

if TYPE_CHECKING:
    from torch import Tensor

_MAX_SPREAD: Final = 4  # elements of the file that are read per element of a tensor

STORAGES: Final[Mapping[str, str]] = {  # -> what safetensors calls the type
    "torch.HalfStorage": "F16",
    "torch.FloatStorage": "F32",
    "torch.DoubleStorage": "F64",
    "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
    "torch.ComplexFloatStorage": "C64",
    "torch.storage.UntypedStorage": "U8",  # bytes, whose tensors say their type
}
DTYPES: Final[Mapping[str, str]] = {  # torch's name of a type -> safetensors'
    f"torch.{TensorInfo((), code).type_name}": code for code in CODES
}


class StorageRef:
    """`count` elements in a row; `span` is their place, known once the file's index was read."""

    __slots__ = ("code", "count", "span")

    def __init__(self, code: str, count: int, span: Span | None = None) -> None:
        self.code, self.count, self.span = code, count, span

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return TensorInfo((self.count,), self.code).nbytes


class TensorRef:
    """A tensor that is still in its file."""

    __slots__ = ("code", "offset", "shape", "storage", "stride")

    def __init__(
        self,
        storage: StorageRef,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        code: str | None = None,
    ) -> None:
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride
        self.code = code or storage.code

    def __repr__(self) -> str:
        return f"<tensor {self.info}>"

    @property
    def info(self) -> TensorInfo:
        """Shape, and type of the elements."""
        return TensorInfo(self.shape, self.code)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, row by row."""
        return self.info.nbytes

    def moved(self, span: Span) -> TensorRef:
        """The same tensor of a storage whose bytes are those of `span`, as many."""
        storage = StorageRef(self.storage.code, self.storage.count, span)
        return TensorRef(storage, self.offset, self.shape, self.stride, self.code)

    def pieces(self, size: int) -> Iterator[bytes]:
        """The elements' bytes in row-major order, at most `size` bytes at a time."""
        expected = row_major(self.shape)
        pairs = zip(self.shape, self.stride, expected, strict=True)
        if all(length == 1 or found == wanted for length, found, wanted in pairs):
            yield from self._stored(math.prod(self.shape)).pieces(size)
        else:
            data = self.load().contiguous().reshape(-1).view(torch.uint8).numpy().data
            yield from (bytes(data[i : i + size]) for i in range(0, len(data), size))

    def load(self) -> Tensor:
        """The tensor in memory."""
        if not math.prod(self.shape):
            return torch.empty(self.shape, dtype=self.info.dtype)
        extent = self._extent()
        if extent > _MAX_SPREAD * math.prod(self.shape) + 1024:
            raise CheckpointError(
                f"a tensor of shape {list(self.shape)} is spread over {extent} elements of its file"
            )
        data = bytearray(self._stored(extent).read())
        flat = torch.frombuffer(data, dtype=self.info.dtype)
        return flat.as_strided(self.shape, self.stride)

    def _extent(self) -> int:
        """Elements of the storage from the first to the last one used."""
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))

    def _stored(self, count: int) -> Span:
        span, item = self.storage.span, self.info.itemsize
        if span is None:
            raise CheckpointError("a tensor's content is not in its file")
        return span.part(self.offset * item, count * item)


def row_major(shape: Sequence[int]) -> list[int]:
    """Strides of a tensor whose elements follow one another, last axis fastest."""
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def rebuild_tensor(args: tuple[object, ...], m: Machine) -> TensorRef:
    """(storage, offset, shape, stride, requires grad, hooks, state) -> reference within bounds."""
    return _referred(args, m, *args[6:7])


def rebuild_typed(args: tuple[object, ...], m: Machine) -> TensorRef:
    """The same of a type without storages of its own: (..., hooks, type, state), of bytes."""
    kind = args[6] if len(args) > 6 else None
    code = DTYPES.get(kind.name) if isinstance(kind, Global) else None
    if code is None or not isinstance(args[0], StorageRef) or args[0].code != "U8":
        raise m.refuse(f"a tensor of {kind_of(kind)}, expected bytes and the type of a tensor")
    return _referred(args, m, *args[7:8], code=code)


def _referred(
    args: tuple[object, ...], m: Machine, state: object = None, *, code: str | None = None
) -> TensorRef:
    if len(args) < 4 or not isinstance(args[0], StorageRef) or type(args[1]) is not int:
        raise m.refuse("a tensor without storage, offset, shape and strides")
    storage, offset, shape, stride = (
        args[0],
        args[1],
        whole_numbers(args[2]),
        whole_numbers(args[3]),
    )
    if shape is None or stride is None or len(shape) != len(stride):
        raise m.refuse("a tensor whose shape and strides are not a few whole numbers each")
    if state:  # flags by name
        raise m.refuse("a tensor that is the conjugate or the negative of what is stored")
    tensor = TensorRef(storage, offset, shape, stride, code)
    # A stride of 0 could make a terabyte out of one number.
    count, held = math.prod(shape), storage.nbytes // tensor.info.itemsize
    if offset < 0 or count > held or (count and offset + tensor._extent() > held):
        raise m.refuse(f"a tensor of shape {list(shape)} from element {offset} of {held}")
    m.budget.spend(300)
    return tensor


def rebuild_parameter(args: tuple[object, ...], m: Machine) -> TensorRef:
    """(tensor, requires grad, hooks) -> the tensor."""
    if not args or not isinstance(args[0], TensorRef):
        raise m.refuse("a parameter without a tensor")
    return args[0]


def storage_of(pid: object, m: Machine, length: int) -> tuple[StorageRef, str]:
    """("storage", class, key, location, count, ...) of `length` parts -> storage and its key."""
    if not isinstance(pid, tuple) or len(pid) != length or not is_one_of(pid[0], "storage"):
        raise m.refuse("an object stored elsewhere that is not the storage of a tensor")
    _, kind, key, _, count, *view = pid
    code = STORAGES.get(kind.name) if isinstance(kind, Global) else None
    if code is None or not isinstance(key, str) or type(count) is not int or count < 0:
        raise m.refuse(f"a storage of {kind_of(kind)} that is not one of numbers")
    if any(part is not None for part in view):
        raise m.refuse("a storage that is a view of another one")
    return StorageRef(code, count), key


TENSOR_NAMES: Final[Mapping[str, Handler | None]] = {
    **dict.fromkeys(STORAGES),
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": rebuild_typed,
    "torch._utils._rebuild_parameter": rebuild_parameter,
}

_MAGIC: Final = 0x1950A86A20F9469CFC6C
_PROTOCOL: Final = 1001
FIRST_BYTES: Final = b"\x80\x02\x8a\n" + _MAGIC.to_bytes(10, "little") + b"."
_PID_PARTS: Final = 6


def read_legacy(span: Span, permitted: Permitted, budget: Budget) -> object:
    """The object saved in `span`, with references to the storages behind it."""
    cursor = Cursor(span)
    _read_prologue(cursor, budget)
    storages: dict[str, StorageRef] = {}

    def persistent(pid: object, machine: Machine) -> StorageRef:
        found, key = storage_of(pid, machine, _PID_PARTS)
        known = storages.setdefault(key, found)
        if (known.code, known.count) != (found.code, found.count):
            raise machine.refuse(f"storage {shown(key)} is described in two ways")
        return known

    value = run(Machine(cursor, permitted, budget, persistent))
    _place(storages, run(Machine(cursor, {}, budget)), cursor, budget)
    return value


def load_from_bytes(args: tuple[object, ...], machine: Machine) -> object:
    """The storage in a block of bytes, one argument."""
    block = args[0] if len(args) == 1 else None
    if isinstance(block, bytes):
        block = Span(ByteSource(block, machine.budget.name), 0, len(block))
    if not isinstance(block, Span):
        raise machine.refuse(f"a tensor's block is {kind_of(block)}, expected bytes")
    # Only names of storages in here: a block within a block would have no end.
    value = read_legacy(block, dict.fromkeys(STORAGES), machine.budget)
    if not isinstance(value, StorageRef):
        raise machine.refuse(f"a tensor's block holds {kind_of(value)}, expected a storage")
    return value


def _read_prologue(cursor: Cursor, budget: Budget) -> None:
    magic, protocol, facts = (run(Machine(cursor, {}, budget)) for _ in range(3))
    if (type(magic), type(protocol)) != (int, int) or (magic, protocol) != (_MAGIC, _PROTOCOL):
        raise CheckpointError(f"{budget.name}: not a block written by torch.save")
    if not isinstance(facts, dict) or facts.get("little_endian") is not True:
        raise CheckpointError(f"{budget.name}: expected tensors in little-endian byte order")


def _place(storages: dict[str, StorageRef], keys: object, cursor: Cursor, budget: Budget) -> None:
    """Let every storage know where its bytes are."""
    listed = [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []
    if len(listed) != len(storages) or set(listed) != set(storages):
        raise CheckpointError(
            f"{budget.name}: {len(storages)} storages are used, but {len(listed)} are listed"
        )
    for key in listed:
        storage = storages[key]
        count = int.from_bytes(cursor.take(8), "little")
        if count != storage.count:
            raise CheckpointError(
                f"{budget.name}: storage {shown(key)} holds {count} elements,"
                f" expected {storage.count}"
            )
        storage.span = cursor.skip(storage.nbytes)
    if cursor.remaining:
        raise CheckpointError(f"{budget.name}: {cursor.remaining} bytes follow the last storage")
