"""What a source file holds before it is written: tensors, facts, and the user's hints to them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from merge_rl.errors import CheckpointError, IncompatibleCheckpointError
from merge_rl.storage.files import TensorInfo
from merge_rl.storage.pickles import TensorRef, kind_of, shown

MAX_NAME: Final = 500  # characters
MAX_TENSORS: Final = 20_000
_NAME: Final = re.compile(rf"[0-9A-Za-z_.-]{{1,{MAX_NAME}}}")
_MAX_VALUES: Final = 2000
_MAX_TEXT: Final = 1000
ELSE: Final = "another network takes --network package.module:factory"
DEFAULT_BATCH: Final = 256  # images a step, in SiT's public training

Shapes = Mapping[str, tuple[int, ...]]
"""Tensors by name, as far as a family of networks is told by them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Extracted:
    """Weights of one network, still in their file."""

    path: Path
    tensors: Mapping[str, TensorRef]
    config: Mapping[str, Any] | None  # None where the file does not say it, {} of an unknown one
    stem: str  # of the output's name
    folder: str = ""  # of the output, for a file that holds several tracks
    nimg: int | None = None
    ema_std: float | None = None
    ema_gamma: float | None = None
    ema_start: float | None = None
    width: float | None = None  # that a post-hoc EMA was to have
    track: str | None = None
    licence: str | None = None  # that a manifest states
    autoencoder: str | None = None  # registered name of what makes images of the samples
    sampler: tuple[tuple[str, Any], ...] = ()  # settings that differ from the defaults
    facts: Mapping[str, Any] = field(default_factory=dict)  # kept as JSON in the output
    assumed: Mapping[str, str] = field(default_factory=dict)  # option of the config -> what and why
    notes: tuple[str, ...] = ()  # what else the user should hear of
    kind: str = "weights"  # the format that it was read as

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def state_dict(value: object, where: str) -> dict[str, TensorRef]:
    """A mapping of names to tensors; CheckpointError for anything else."""
    if not isinstance(value, dict) or not value:
        raise CheckpointError(f"{where}: expected tensors by name, found {kind_of(value)}")
    if len(value) > MAX_TENSORS:
        raise CheckpointError(f"{where}: {len(value)} tensors, at most {MAX_TENSORS} are expected")
    for name, tensor in value.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            found = shown(name) if isinstance(name, str) else kind_of(name)
            raise CheckpointError(f"{where}: expected names of tensors, found {found}")
        if not isinstance(tensor, TensorRef):
            raise CheckpointError(f"{where}: {name} is {kind_of(tensor)}, expected a tensor")
    return value


def shapes_of(tensors: Mapping[str, TensorRef]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def require_axes(
    shapes: Mapping[str, tuple[int, ...]], name: str, ndim: int, family: str
) -> tuple[int, ...]:
    """The shape of a tensor with `ndim` axes; CheckpointError where it is missing or has others."""
    shape = tuple(shapes.get(name, ()))
    if len(shape) != ndim:
        found = f"of shape {list(shape)}" if name in shapes else "missing"
        raise CheckpointError(
            f"not a {family}: tensor {name!r} is {found}, expected {ndim} axes; {ELSE}"
        )
    return shape


def infos_of(tensors: Mapping[str, TensorRef]) -> dict[str, TensorInfo]:
    """Name -> shape and type."""
    return {name: ref.info for name, ref in tensors.items()}


def require_size(found: Extracted, file_bytes: int) -> None:
    """Refuse tensors that share so much of their file that the output would outgrow it."""
    if found.nbytes > file_bytes:
        raise CheckpointError(
            f"{found.path}: its tensors take {found.nbytes} bytes, the whole file has {file_bytes}"
        )


def plain(value: object) -> Any:
    """What JSON can hold of a value, of moderate size; None where it cannot."""
    return _plain(value, [_MAX_VALUES])


def _plain(value: object, room: list[int]) -> Any:
    room[0] -= 1
    if room[0] < 0 or value is None:
        return None
    if isinstance(value, str):
        return value[:_MAX_TEXT].encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [_plain(item, room) for item in value[:_MAX_VALUES]]
    if isinstance(value, dict):
        named = [(key, item) for key, item in value.items() if isinstance(key, str)]
        return {_plain(key, room): _plain(item, room) for key, item in named[:_MAX_VALUES]}
    return None


def require_same(found: Extracted, expected: Mapping[str, TensorInfo], name: str) -> None:
    """Refuse tensors other than `expected`, those of the file `name`."""
    forms = infos_of(found.tensors)
    odd = [key for key in {**expected, **forms} if forms.get(key) != expected.get(key)]
    if odd:
        have, want = (form.get(odd[0], "missing") for form in (forms, expected))
        raise IncompatibleCheckpointError(
            f"{found.path}: not the same network as {name}: tensor {odd[0]} is {have} here and"
            f" {want} there ({len(odd)} of {len(forms)} tensors differ); convert different"
            " networks or types into different folders"
        )


@dataclass(frozen=True, kw_only=True)
class Hints:
    """The user's settings of a conversion, which override what files say."""

    family: str | None = None
    num_heads: int | None = None
    num_classes: int | None = None
    null_class: bool | None = None
    network: str | None = None
    images_per_step: int | None = None
    ema_std: str | None = None
    update_every: int | None = None
    adapters: str = "factors"
    part: str | None = None
    format: str = "auto"


NO_HINTS: Final = Hints()
