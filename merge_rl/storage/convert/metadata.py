"""Metadata of a checkpoint beside its weights: settings, counters, images a step."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from merge_rl import own_code
from merge_rl.config import real_number, whole_number
from merge_rl.errors import ManifestError
from merge_rl.storage.convert.contents import DEFAULT_BATCH, Extracted, Hints, plain
from merge_rl.storage.convert.trainers import batches_of, is_lightning
from merge_rl.storage.pickles import Record, TensorRef
from merge_rl.untrusted import parse_yaml

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
_EPOCH: Final = r"(?!(?:.*[^a-z])?ep(?:och)?[-_.=]?\d)"
_NAMED: Final = re.compile(rf"(?:{_EPOCH}.*[-_.])?(\d{{7,9}})")
_WORD: Final = re.compile(r"(?:.*[^a-z])?(?:steps?|iter(?:ation)?)[-_.=]?(\d{1,9})")
_LAST: Final = re.compile(rf"(?:{_EPOCH}.*\D)?(?<!\d\.)(\d{{1,9}})")
_MOST: Final = 2**30
_MAX_DOCUMENT: Final = 100_000  # characters of settings that are text


@dataclass(frozen=True, kw_only=True)
class Said:
    """Metadata of a checkpoint; None where it is missing or ambiguous."""

    settings: Mapping[str, Any]  # all of them, plain
    num_classes: int | None = None
    class_dropout: float | None = None
    num_heads: int | None = None
    batch: int | None = None  # images a step, over all devices
    steps: int | None = None
    images: int | None = None  # seen until then, where they are counted
    share: int | None = None  # images of a batch of an unknown number of processes, taken for one

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
    batches = _count(batches_of(data))
    return Said(
        settings=settings,
        num_classes=_count(_first(settings, _CLASSES)),
        class_dropout=_share(_first(settings, _DROPOUT)),
        num_heads=_count(_first(settings, _HEADS)),
        batch=_images_a_step(settings),
        images=_count(_first(beside, _SEEN)) or _images_seen(batches, settings),
        steps=_count(_first(beside | _counters(data), _STEPS)),
        share=_share_alone(settings) if is_lightning(data) else None,
    )


def _counters(data: Mapping[str, object]) -> dict[str, object]:
    """The steps that are kept as a tensor of one number, beside state dicts under their names."""
    if not any(isinstance(value, dict) for value in data.values()):
        return {}  # a tensor of the network's own
    return {name: _number_in(data[name]) for name in _STEPS if name in data}


def _number_in(value: object) -> object:
    """A tensor of one number as that number; all else as it is."""
    if isinstance(value, TensorRef) and value.shape in ((), (1,)):
        return value.load().item()
    return value


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


def _share_alone(settings: Mapping[str, Any]) -> int | None:
    """A batch of one process, as Lightning's programs keep it, without the number of these."""
    known = _BATCH + _SHARE + ("world_size",)
    return None if _count(_first(settings, known)) else _count(_first(settings, ("batch_size",)))


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
    return _number_in(value)


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


def trained(item: Extracted, said: Said, hints: Hints, counted: int | None) -> Extracted:
    """With what the training program kept beside the weights: settings and progress.

    Steps are those that the file says, else `counted`, else those of its name: of seven digits,
    after the word, or where the user says the images of a step the last number. nimg is their
    product with the images of a step.
    """
    named, step = item.nimg, _NAMED.fullmatch(item.path.stem)
    counted = _steps_named(item, said, hints) if counted is None else counted
    steps = counted if said.steps is None else said.steps
    batch = hints.images_per_step or said.batch
    notes, images = item.notes, None if steps is None else steps * (batch or DEFAULT_BATCH)
    if said.images is not None and hints.images_per_step is None:
        images = said.images
    if step and steps is not None and images is not None:
        alike = (steps, steps + 1, steps - 1, images, images // 1000)  # of images, or thousands
        if int(step[1]) not in alike:
            notes += (f"its name says {int(step[1])}, the file itself step {steps}, which counts",)
    if steps is not None and batch is None and said.images is None:
        notes += (f"no batch size said; nimg takes {DEFAULT_BATCH} images a step",)
    if said.share is not None and images is not None and hints.images_per_step is None:
        notes += (f"batch_size {said.share} taken for one process (--images-per-step)",)
    if images is None and hints.images_per_step:
        notes += ("no step said, by the file or by what it is called; it gets no nimg",)
    return replace(
        item,
        nimg=named if images is None else images,
        facts={"training": plain(said.settings)} if said.settings else {},
        notes=notes,
    )


def _steps_named(item: Extracted, said: Said, hints: Hints) -> int | None:
    """The steps in the name of a file; None where its number may well be another's: of epochs,
    of what the networks of a known family are called by.
    """
    stem, known = item.path.stem.lower(), item.config and not own_code.is_own(item.config["model"])
    found = _NAMED.fullmatch(stem) or _WORD.fullmatch(stem)
    if found is None and hints.images_per_step and not known and said.number("epoch") is None:
        found = _LAST.fullmatch(stem)
    return int(found[1]) if found else None
