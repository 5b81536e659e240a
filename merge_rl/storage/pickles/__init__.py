"""Pickles and torch archives read as data: tensors and plain containers, nothing is ever called."""

from merge_rl.storage.pickles.machine import Record
from merge_rl.storage.pickles.modules import is_module, tensors_of_module
from merge_rl.storage.pickles.reading import Alike, read_data, read_pickle
from merge_rl.storage.pickles.spans import ByteSource, Span
from merge_rl.storage.pickles.tensors import StorageRef, TensorRef, row_major
from merge_rl.storage.pickles.values import kind_of, shown

__all__ = [
    "Alike",
    "ByteSource",
    "Record",
    "Span",
    "StorageRef",
    "TensorRef",
    "is_module",
    "kind_of",
    "read_data",
    "read_pickle",
    "row_major",
    "shown",
    "tensors_of_module",
]
