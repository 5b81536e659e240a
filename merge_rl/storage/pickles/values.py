"""What a pickle may turn into here: plain data, inert records, and nothing that acts.

The limits hold for every file. They are far above what checkpoints need, and low enough that a
file made to exhaust memory or time is refused within seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from merge_rl.errors import CheckpointError

MAX_BUDGET: Final = 64 * 2**20  # ten times what the largest published networks take
MAX_TEXT_BYTES: Final = 4 * 2**20
MAX_INTEGER_BYTES: Final = 128
MAX_NUMBER_KEYS: Final = 20_000
MAX_MARKS: Final = 500
MAX_DEPTH: Final = 200
MAX_NODES: Final = 2_000_000
MAX_DIMENSIONS: Final = 32
MAX_ELEMENTS: Final = 2**48


class Budget:
    """Estimated bytes that reading may still allocate; every opcode costs a little of it."""

    def __init__(self, name: str, file_bytes: int) -> None:
        self.name = name
        self.left = min(4 * 2**20 + 64 * file_bytes, MAX_BUDGET)
        self.number_keys = MAX_NUMBER_KEYS

    def spend(self, cost: int) -> None:
        """Take `cost` off; CheckpointError when nothing is left."""
        self.left -= cost
        if self.left < 0:
            raise CheckpointError(
                f"{self.name}: asks for more objects than a checkpoint of its size can need"
            )

    def require_keys(self, keys: list[object]) -> None:
        """Refuse keys of a mapping, or members of a set, that could be slow to look up."""
        for key in keys:
            if type(key) is str or type(key).__hash__ is object.__hash__:
                continue  # records are told apart by being another one
            # Hashes of numbers can be chosen such that all collide, those of text cannot; and the
            # hash of a tuple of tuples of tuples takes exponential time.
            if not (key is None or isinstance(key, (int, float))):
                raise CheckpointError(
                    f"{self.name}: expected text or a number as key, found {kind_of(key)}"
                )
            self.number_keys -= 1
        if self.number_keys < 0:
            raise CheckpointError(
                f"{self.name}: more than {MAX_NUMBER_KEYS} keys are numbers, too many to look up"
            )


@dataclass(frozen=True)
class Global:
    """A permitted name of a class or function: a label, never looked up or called."""

    name: str


_CLASSES: Final = {"TensorRef": "a tensor", "StorageRef": "a storage"}


def kind_of(value: object) -> str:
    """A few words for a value, without showing what it contains."""
    names = {type(None): "nothing", str: "text", int: "a whole number", dict: "a mapping"}
    if isinstance(value, Global):
        return f"the name {value.name}"
    return (
        names.get(type(value)) or _CLASSES.get(type(value).__name__) or (repr(type(value).__name__))
    )


def shown(text: str, limit: int = 80) -> str:
    """Text of the file for a message: without characters that act on a terminal, and short."""
    plain = "".join(c if c.isprintable() else "?" for c in text[:limit])
    return plain if len(text) <= limit else f"{plain[: limit - 3]}..."


def is_one_of(value: object, *choices: str) -> bool:
    """Whether `value` is text and one of these; safe where `==` of an array is not a yes or no."""
    return isinstance(value, str) and value in choices


def whole_numbers(value: object) -> tuple[int, ...] | None:
    """A shape or strides: at most 32 whole numbers >= 0 whose product is possible, else None."""
    if not isinstance(value, tuple) or len(value) > MAX_DIMENSIONS:
        return None
    sizes = tuple(size for size in value if type(size) is int and size >= 0)
    # An empty tensor needs no bytes, so that nothing else bounds its other dimensions.
    possible = math.prod(max(size, 1) for size in sizes) <= MAX_ELEMENTS
    return sizes if len(sizes) == len(value) and possible else None
