"""What a source file holds before it is written: its weights, and what it says of its training."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from merge_rl.config import real_number, whole_number
from merge_rl.errors import CheckpointError, IncompatibleCheckpointError, ManifestError
from merge_rl.storage.convert.trainers import batches_of
from merge_rl.storage.files import TensorInfo
from merge_rl.storage.pickles import Record, TensorRef, kind_of, shown
from merge_rl.untrusted import parse_yaml

MAX_NAME: Final = 500  # characters
MAX_TENSORS: Final = 20_000
_NAME: Final = re.compile(rf"[0-9A-Za-z_.-]{{1,{MAX_NAME}}}")
_MAX_VALUES: Final = 2000
_MAX_TEXT: Final = 1000
_MAX_DOCUMENT: Final = 100_000
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
        raise CheckpointError(f"not a {family}: tensor {name!r} is {found}, expected {ndim} axes")
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


_HOLDERS: Final = re.compile(
    "((train|training|trainer|model|network|run|experiment|data|dataset|datamodule)_)?(args|arguments|config|conf|cfg"
    "|hparams|hyper_?parameters|options|opts|settings|kwargs|flags)"
)
# Where objects of OmegaConf and of ml_collections keep their settings.
_CONTENT: Final = ("_content", "_fields", "_val", "_value")
_CLASSES: Final = ("num_classes", "n_classes", "nb_classes")
_DROPOUT: Final = ("class_dropout_prob", "cfg_prob", "label_dropout_prob")
_HEADS: Final = ("num_heads", "n_heads")
_STEPS: Final = (
    "steps", "step", "train_steps", "global_step", "global_steps", "iteration", "iter",
)  # fmt: skip
_SEEN: Final = ("global_samples",)  # DeepSpeed's
_BATCH: Final = ("global_batch_size", "total_batch_size")
_ACCUMULATED: Final = (
    "gradient_accumulation_steps", "gradient_accumulate_every", "accumulate_grad_batches",
    "grad_accum_steps", "accum_iter",
)  # fmt: skip
# The batch of one process.
_SHARE: Final = (
    "batch_size_per_gpu", "per_gpu_batch_size", "batch_size_per_device",
    "per_device_train_batch_size", "train_micro_batch_size_per_gpu",
)  # fmt: skip
_MOST: Final = 2**30


@dataclass(frozen=True, kw_only=True)
class Hints:
    """What the user says where a file does not; it counts more than what the file says."""

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


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a checkpoint says of itself; None where it does not, or says several things at once."""

    settings: Mapping[str, Any]  # all of them, plain
    num_classes: int | None = None
    class_dropout: float | None = None
    num_heads: int | None = None
    batch: int | None = None  # images a step, over all devices
    steps: int | None = None
    images: int | None = None  # seen until then, where they are counted

    def number(self, name: str) -> float | None:
        """The number of that name, wherever in the settings."""
        return real_number(_first(self.settings, (name,)))


def read_said(data: Mapping[str, object]) -> Said:
    """The settings beside the weights: in a dict, a Namespace, an object like OmegaConf's, or text.

    REPA's programs say the images of a step as `batch_size` and count `steps` beside the weights.
    """
    beside = {key: value for key, value in data.items() if _is_number(value)}
    settings: dict[str, Any] = dict(beside)
    for key, value in data.items():
        if not isinstance(key, str) or not _HOLDERS.fullmatch(key):
            continue
        found = _settings(_parsed(value) if isinstance(value, str) else value)
        if isinstance(found, dict):
            settings |= found
    return Said(
        settings=settings,
        num_classes=_count(_first(settings, _CLASSES)),
        class_dropout=_share(_first(settings, _DROPOUT)),
        num_heads=_count(_first(settings, _HEADS)),
        batch=_images_a_step(settings),
        images=_count(_first(beside, _SEEN)) or _images_seen(_count(batches_of(data)), settings),
        steps=_count(_first(beside | _counters(data), _STEPS)),
    )


def _counters(data: Mapping[str, object]) -> dict[str, object]:
    """The steps that are kept as a tensor of one number, beside state dicts under their names."""
    if not any(isinstance(value, dict) for value in data.values()):
        return {}  # a tensor of the network's own
    kept = {name: data[name] for name in _STEPS if name in data}
    counts = {k: t for k, t in kept.items() if isinstance(t, TensorRef) and t.shape in ((), (1,))}
    return {name: count.load().item() for name, count in counts.items()}


def _images_a_step(settings: Mapping[str, Any]) -> int | None:
    """The whole batch, or that of a pass times the passes that a step of the optimizer adds up."""
    if whole := _count(_first(settings, _BATCH)):
        return whole
    one = _images_a_pass(settings)
    return one and one * (_count(_first(settings, _ACCUMULATED)) or 1)


def _images_a_pass(settings: Mapping[str, Any]) -> int | None:
    """Of all processes; programs that keep how many say the batch of one (MAE's, MAR, JiT)."""
    processes, share = (_count(_first(settings, names)) for names in (("world_size",), _SHARE))
    one = share if share and processes else _count(_first(settings, ("batch_size",)))
    return one and one * (processes or 1)


def _images_seen(batches: int | None, settings: Mapping[str, Any]) -> int | None:
    one = None if _count(_first(settings, _BATCH)) else _images_a_pass(settings)
    return batches * one if batches and one else None


def _settings(value: object) -> object:
    """Records as their attributes, and what wraps settings as the settings."""
    if isinstance(value, Record):
        state = value.state if isinstance(value.state, dict) else {}
        inner = [state[key] for key in _CONTENT if key in state]
        return _settings(inner[0] if inner else state)
    if isinstance(value, dict):
        named = ((key, item) for key, item in value.items() if isinstance(key, str))
        return {key.replace("-", "_"): _settings(item) for key, item in named}
    if isinstance(value, (list, tuple)):
        return [_settings(item) for item in value]
    return value


def _parsed(text: str) -> object:
    """What settings that were saved as YAML, or as JSON, which is a part of it, say."""
    try:
        return parse_yaml(text, "settings") if len(text) <= _MAX_DOCUMENT else None
    except ManifestError:
        return None


def _first(settings: Mapping[str, Any], names: tuple[str, ...]) -> object:
    """The value of the first name that is there; of sections within, where all agree on it."""
    for name in names:
        level: list[Mapping[str, Any]] = [settings]
        while level:
            found = [part[name] for part in level if _is_number(part.get(name))]
            if found:
                return found[0] if len(set(map(real_number, found))) == 1 else None
            level = [v for part in level for v in part.values() if isinstance(v, dict)]
    return None


def _is_number(value: object) -> bool:
    return real_number(value) is not None  # be it written as text


def _count(value: object) -> int | None:
    found = whole_number(value)
    return found if found is not None and 0 < found < _MOST else None


def _share(value: object) -> float | None:
    found = real_number(value)
    return found if found is not None and 0 <= found <= 1 else None
