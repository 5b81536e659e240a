"""Pickles and torch files as plain data: nothing in the file is imported, looked up or run.

What comes out: dict, list, tuple, set, text, numbers, bytes; `Span` for longer bytes, which stay
in the file until `bytes(span)` is asked for; NumPy arrays of plain numbers (read-only); `TensorRef`
for tensors; `Record` for objects of the few known classes; `Global` where such a class is
mentioned. Ordered and attribute dicts are dicts. What comes out can be walked by recursion: it
has no cycles, at most 200 levels and at most two million values.

Anything else, whatever the file is made of, is a `CheckpointError`; time and memory are bounded
by the size of the file.
"""

from __future__ import annotations

from merge_rl.errors import CheckpointError
from merge_rl.storage import torch_archive, torch_legacy
from merge_rl.storage.byte_source import ByteSource, Cursor, Readable, Span
from merge_rl.storage.pickle_globals import PERMITTED
from merge_rl.storage.pickle_machine import Machine
from merge_rl.storage.pickle_opcodes import run
from merge_rl.storage.pickle_values import Budget, Global, Record, require_tree
from merge_rl.storage.torch_storage import TensorRef

__all__ = ["Global", "Record", "Span", "TensorRef", "read_data", "read_pickle"]


def read_pickle(content: Readable, name: str | None = None) -> object:
    """The value of a pickle, from a path or from the bytes themselves; `name` is for messages."""
    source = ByteSource(content, name)
    return _checked(_plain_pickle(source, _budget(source)), source)


def read_data(content: Readable, name: str | None = None) -> object:
    """The value of a pickle or of anything torch.save wrote, whatever the file is called."""
    source = ByteSource(content, name)
    budget, first = _budget(source), source.read(0, min(source.size, 32))
    if first.startswith(torch_archive.FIRST_BYTES):
        return _checked(torch_archive.read_archive(source, budget), source)
    if first.startswith(torch_legacy.FIRST_BYTES):
        whole = Span(source, 0, source.size)
        return _checked(torch_legacy.read_legacy(whole, PERMITTED, budget), source)
    return _checked(_plain_pickle(source, budget), source)


def _budget(source: ByteSource) -> Budget:
    if not source.size:
        raise CheckpointError(f"{source.name}: the file is empty")
    return Budget(source.name, source.size)


def _plain_pickle(source: ByteSource, budget: Budget) -> object:
    cursor = Cursor(Span(source, 0, source.size))
    value = run(Machine(cursor, PERMITTED, budget))
    if cursor.remaining:
        raise CheckpointError(f"{source.name}: {cursor.remaining} bytes follow the end of its data")
    return value


def _checked(value: object, source: ByteSource) -> object:
    require_tree(value, source.name)
    return value
