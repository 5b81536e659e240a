"""What a checkpoint says of its own training, whatever holds its settings, and what a user says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from merge_rl.storage.pickles import Record

_HOLDERS: Final = ("args", "config", "cfg", "hparams", "hyper_parameters", "options", "settings")
# Where objects of OmegaConf and of ml_collections keep their settings.
_CONTENT: Final = ("_content", "_fields", "_val", "_value")
_CLASSES: Final = ("num_classes", "n_classes", "nb_classes")
_DROPOUT: Final = ("class_dropout_prob", "cfg_prob", "label_dropout_prob")
_HEADS: Final = ("num_heads", "n_heads")
_STEPS: Final = ("steps", "step", "train_steps", "global_step")
_BATCH: Final = ("global_batch_size", "total_batch_size", "batch_size")
_MOST: Final = 2**30


@dataclass(frozen=True, kw_only=True)
class Hints:
    """What the user says where a file does not; it counts more than what the file says."""

    num_heads: int | None = None
    num_classes: int | None = None
    null_class: bool | None = None


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


def read_said(data: Mapping[str, object]) -> Said:
    """The settings beside the weights: in a dict, a Namespace, or an object like OmegaConf's.

    REPA's programs say the images of a step as `batch_size` and count `steps` beside the weights.
    """
    settings: dict[str, Any] = {}
    for key in _HOLDERS:
        found = _settings(data.get(key))
        if isinstance(found, dict):
            settings |= found
    beside = {key: value for key, value in data.items() if _is_number(value)}
    return Said(
        settings=settings,
        num_classes=_count(_first(settings, _CLASSES)),
        class_dropout=_share(_first(settings, _DROPOUT)),
        num_heads=_count(_first(settings, _HEADS)),
        batch=_count(_first(settings, _BATCH)),
        steps=_count(_first(beside, _STEPS)),
    )


def _settings(value: object) -> object:
    """Records as their attributes, and what wraps settings as the settings."""
    if isinstance(value, Record):
        state = value.state if isinstance(value.state, dict) else {}
        inner = [state[key] for key in _CONTENT if key in state]
        return _settings(inner[0] if inner else state)
    if isinstance(value, dict):
        return {key: _settings(item) for key, item in value.items() if isinstance(key, str)}
    if isinstance(value, (list, tuple)):
        return [_settings(item) for item in value]
    return value


def _first(settings: Mapping[str, Any], names: tuple[str, ...]) -> object:
    """The value of the first name that is there; of sections within, where all agree on it."""
    for name in names:
        level: list[Mapping[str, Any]] = [settings]
        while level:
            found = [part[name] for part in level if _is_number(part.get(name))]
            if found:
                return found[0] if all(value == found[0] for value in found) else None
            level = [v for part in level for v in part.values() if isinstance(v, dict)]
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _count(value: object) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and 0 < value < _MOST else None


def _share(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and 0 <= value <= 1 else None
