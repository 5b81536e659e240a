"""Folders that training programs and diffusers write: a checkpoint each, or a series of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from merge_rl.errors import CheckpointError
from merge_rl.storage.checkpoints import is_network_config, library_document, network_config
from merge_rl.storage.convert.contents import Extracted, Hints
from merge_rl.storage.convert.trainers import deepspeed_weights
from merge_rl.storage.files import (
    SAVED,
    averaged,
    convertible,
    in_training_order,
    is_shard_name,
    natural_key,
    network_name,
    of_series,
    weights_in,
    weights_stem,
    without_numbers,
)
from merge_rl.storage.pickles import TensorRef

# What libraries call the weights in the folder of a checkpoint.
GENERIC: Final = ("model", "diffusion_pytorch_model", "pytorch_model", "adapter_model")
_PICKLED: Final = (
    *("pytorch_model.bin", "adapter_model.bin", "diffusion_pytorch_model.bin"),
    "pytorch_model.bin.index.json",
)
# What lies beside the weights to go on with: optimizers, schedules, states of generators.
_BESIDE: Final = re.compile(
    r"(optimizer|scheduler|scaler|sampler|dl_state|rng_state|random_states|custom_checkpoint"
    r"|training_args|trainer_state|lr_scheduler|step\.pth|opt[-_]?[0-9]+\.pt)"
)
POSTHOC: Final = re.compile(r"(?P<index>[0-9]{1,4})\.(?P<step>[0-9]{1,12})\.pt")
AVERAGE: Final = re.compile(r"(?:.*[-_.])?ema(?:[-_.]?(?P<decay>0?\.\d+))?(?:[-_.].*)?")
_STEPS: Final = re.compile(
    r"(?:checkpoint-|(?:global_?)?steps?[-_=]?|iter(?:ation)?[-_]?)([0-9]+)$|^([0-9]+)\.ckpt$"
)
_FSDP: Final = ("pytorch_model_fsdp_0", "distributed_checkpoint")


class Place(NamedTuple):
    """A folder that holds one checkpoint: what its weights and their averages are in."""

    kind: str  # "accelerate", "deepspeed", "diffusers", "distcp", "peft", or "weights" of none
    weights: Path  # a file, an index of shards, or the .metadata of a torch checkpoint
    averages: tuple[Path, ...] = ()


def place_of(folder: Path) -> Place | None:
    """What a folder of one checkpoint holds; None for any other folder.

    Weights under a name that all checkpoints share make one of it where its own name has a number,
    or what training goes on with lies beside them.
    """
    for inner in (folder, *(folder / name for name in _FSDP)):
        if (inner / ".metadata").is_file():
            return Place("distcp", inner / ".metadata")
    if (folder / "adapter_config.json").is_file():
        found = _generic(folder)
        if found is None:
            raise CheckpointError(
                f"{folder}: an adapter_config.json without adapter_model.safetensors or .bin"
            )
        return Place("peft", found)
    if whole := deepspeed_weights(folder):
        return Place("deepspeed", whole)
    beside = [item for item in folder.iterdir() if _BESIDE.match(item.name)]
    pairs = [inner for inner in folders_in(folder) if (folder / f"{inner.name}_ema").is_dir()]
    if len(pairs) > 1:
        listed = ", ".join(inner.name for inner in pairs)
        raise CheckpointError(f"{folder}: holds several networks, {listed}; name one's folder")
    if pairs:
        raw, average = _generic(pairs[0]), _generic(folder / f"{pairs[0].name}_ema")
        if raw and average:
            return Place("diffusers", raw, (average,))
    files = [file for file in convertible(folder) if not _BESIDE.match(file.name)]
    if len(files) == 2 and files[1].stem == f"{files[0].stem}_ema":  # as U-ViT's nnet_ema.pth
        return Place("weights", files[0], (files[1],))
    found = _generic(folder)
    averages = [f for f in _right_in(folder) if f != found and AVERAGE.fullmatch(f.stem)]
    alone = len(_right_in(folder)) < 2 + len(averages) and not any(folder.glob("*.pt"))
    within = [file for file in weights_in(folder) if file.parent.parent == folder]
    if found is None and len(within) == 1 and (beside or steps_of(folder) is not None):
        return Place("diffusers", within[0])
    if found and (beside or (alone and re.search("[0-9]", folder.name))):
        custom = sorted(folder.glob("custom_checkpoint_*.pkl"), key=lambda f: natural_key(f.name))
        return Place("accelerate", found, (*averages, *custom))
    return None


def files_in(folder: Path) -> list[Path]:
    """What of a folder is converted: files, or folders of one checkpoint each; [] for nothing.

    Of a folder with snapshots (.pkl), training states are left out: they are several times larger
    and of another type, so that both cannot form one set.
    """
    place = place_of(folder)
    if len(own_files(folder)) < 2:
        # Trainers end by saving the last weights in the folder of the run.
        saved = [item for item in folders_in(folder) if SAVED.fullmatch(item.name)]
        if place is not None:  # a checkpoint, beside DeepSpeed's state of it
            saved = [item for item in saved if not any(item.glob("*_model_states.pt"))]
        if any(map(place_of, saved)):
            return [item for item in folders_in(folder) if not is_pipeline(item) and place_of(item)]
    if place is not None:
        return [folder]
    posthoc = [file for file in folder.iterdir() if POSTHOC.fullmatch(file.name)]
    if posthoc:
        return sorted(posthoc, key=lambda file: [int(n) for n in file.name.split(".")[:2]])
    found = convertible(folder)
    found += [file for file in folder.iterdir() if file.name.endswith(".bin.index.json")]
    usable = [f for f in found if not _BESIDE.match(f.name) and not is_shard_name(f.name)]
    usable += _of_series(usable, _right_in(folder))
    files = in_training_order(usable, lambda file: file.stem)
    states = [file for file in files if file.name.startswith("training-state-")]
    if any(file.suffix.lower() == ".pkl" for file in files):
        files = [file for file in files if file not in states]
    if files or _right_in(folder):
        return files or _right_in(folder)
    inner = [item for item in folders_in(folder) if place_of(item) is not None]
    inner = inner or weights_in(folder)
    if not inner:
        require_weights(folder, [item.name for item in folder.iterdir()])
    return inner


def _of_series(files: Sequence[Path], others: Sequence[Path]) -> list[Path]:
    """Of others those whose names differ from a file's in their numbers: a run changed its format.

    One of the same name is what was made from it.
    """
    named = {weights_stem(file.name): file for file in others}
    return [named[stem] for stem in of_series([file.stem for file in files], named)]


def is_pipeline(folder: Path) -> bool:
    """Whether diffusers saved a pipeline there, as trainings end: the last average once more."""
    return (folder / "model_index.json").is_file()


def require_weights(folder: Path, names: Sequence[str]) -> None:
    """Refuse a folder that holds nothing but what training goes on with."""
    beside = [name for name in names if _BESIDE.match(name)]
    if beside:
        raise CheckpointError(
            f"{folder}: holds {beside[0]}, what training goes on with, and no weights of a network"
        )


def steps_of(path: Path) -> int | None:
    """The steps of training that the name of a folder says; None where its number is another's."""
    found = _STEPS.search(path.name)
    return int(found[1] or found[2]) if found else None


def folders_in(folder: Path) -> list[Path]:
    found = (item for item in folder.iterdir() if item.is_dir() and item.name[0] != ".")
    return sorted(found, key=lambda item: natural_key(item.name))


def own_files(folder: Path) -> list[Path]:
    """The files in a folder that may hold a network each."""
    return [f for f in (*_right_in(folder), *convertible(folder)) if not _BESIDE.match(f.name)]


def _right_in(folder: Path) -> list[Path]:
    return [file for file in weights_in(folder) if file.parent == folder]


def _generic(folder: Path) -> Path | None:
    """The weights of a folder under a name that every checkpoint has, in safetensors first."""
    named = [file for file in _right_in(folder) if weights_stem(file.name) in GENERIC]
    pickled = [folder / name for name in _PICKLED if (folder / name).is_file()]
    return next(iter([*named, *pickled]), None)


def read_library(
    path: Path, tensors: Mapping[str, TensorRef], weights: str, hints: Hints
) -> list[Extracted] | None:
    """The network of diffusers in the folder of `path`; None where that has no such config.

    An average lies in a folder of its own (`unet_ema/`): "auto" takes it where there is one, and
    then leaves the raw weights. Raises CheckpointError for another network of the library.
    """
    document = library_document(path.parent)
    if document is None:
        return None
    if not is_network_config(document):
        known = "UNet2DModel or DiTTransformer2DModel"
        raise CheckpointError(f"{path}: expected {known}, found {document['_class_name']!r:.60}")
    average, beside = averaged(path), path.parent.with_name(f"{path.parent.name}_ema").is_dir()
    if weights == ("model" if average else "ema") or (weights == "auto" and beside):
        return []
    config = _with_classes(network_config(document, path.parent), hints)
    track = "ema" if average else "raw" if beside else None
    latents = config["network"].get("in_channels", 4) == 4
    transformer = config["network"]["_class_name"] != "UNet2DModel"
    return [
        Extracted(
            path=path, tensors=tensors, config=config, stem=network_name(path), track=track,
            folder=track or "", autoencoder="sd-vae-sit" if transformer and latents else None,
        )
    ]  # fmt: skip


def _with_classes(config: dict[str, Any], hints: Hints) -> dict[str, Any]:
    rows = config["network"].get("num_class_embeds")
    if hints.num_classes is not None:
        return {**config, "num_classes": hints.num_classes}
    if hints.null_class is not None and type(rows) is int:
        return {**config, "num_classes": rows - hints.null_class}
    return config


def told_apart(found: list[Extracted], weights: str) -> list[Extracted]:
    """Files of raw weights and of averages of one run, as tracks by what their names say.

    guided-diffusion's programs write `model010000.pt` and `ema_0.9999_010000.pt`, and those of
    consistency models `target_model010000.pt` beside them. As of one file, "auto" takes the
    averages of the first decay.
    """
    names = [AVERAGE.fullmatch(item.stem) if item.track is None else None for item in found]
    said = [name and "-".join(filter(None, ("ema", name["decay"]))) for name in names]
    raw = [item for item, track in zip(found, said, strict=True) if not track]
    first = next(filter(None, said), None)
    if first is None or (not raw and set(said) == {first}) or any(item.track for item in raw):
        return found
    called = _raw_tracks([item.stem for item in raw])
    told = [replace(i, track=track or called[i.stem]) for i, track in zip(found, said, strict=True)]
    kinds = {"auto": (first,), "model": ("raw",), "ema": tuple(filter(None, said))}
    kept = [item for item in told if item.track in kinds.get(weights, (item.track,))]
    left = len(told) - len(kept)
    if kept and left:
        note = f"took {kept[0].track} by the names; {left} files hold others (--weights both)"
        kept[0] = replace(kept[0], notes=(*kept[0].notes, note))
    return kept


def _raw_tracks(stems: Sequence[str]) -> dict[str, str]:
    """Track by stem: "raw", but for what is called otherwise beside files of the name `model`."""
    called = {stem: without_numbers(stem).strip("-_.#") for stem in stems}
    several = "model" in called.values()
    return {stem: name if several and name != "model" else "raw" for stem, name in called.items()}
