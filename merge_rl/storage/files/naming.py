"""What names of files and folders say: which hold weights, and what their network is called."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Final

from merge_rl.storage.files.shards import DIFFUSERS_STEM, INDEX_NAME, INDEX_SUFFIX, MODEL_NAME

SUFFIX: Final = ".safetensors"
PARTS: Final = ("unet", "transformer", "unet_ema", "transformer_ema")  # diffusers' folders
# A training program's folder: checkpoint-500, global_step500, epoch=1-step=500, ckpt_5e4, 500.
SAVED: Final = re.compile(
    r"[0-9]{1,12}|(?:(?:[a-z]+[-_])?(?:checkpoint|ckpt|step|epoch|iter(?:ation)?)"
    r"[-_=]?[0-9]+(?:e[0-9]+)?[km]?[-_]?)+",
    re.IGNORECASE,
)
# In the folder of a checkpoint alone: the folder of one model is called by its files elsewhere.
SHARED: Final = (MODEL_NAME, INDEX_NAME, "adapter_model.safetensors")
PLAIN: Final = (f"{DIFFUSERS_STEM}{SUFFIX}", f"{DIFFUSERS_STEM}{INDEX_SUFFIX}")


def network_name(path: PurePath) -> str:
    """What a network is called by its file: the stem, or the folder of files that have one name.

    "checkpoint-500/unet/diffusion_pytorch_model.safetensors" is "checkpoint-500".
    """
    folders = [part for part in path.parent.parts if part not in PARTS]
    fixed = path.name in PLAIN or (path.name in SHARED and folders and SAVED.fullmatch(folders[-1]))
    named = fixed and folders and folders[-1] not in ("/", "..")
    return folders[-1] if named else weights_stem(path.name)


def in_series(folder: PurePath) -> bool:
    """Whether a folder is, by its name, one of several: of a checkpoint, or of a network in it."""
    return folder.name in PARTS or SAVED.fullmatch(folder.name) is not None


def averaged(path: PurePath) -> bool:
    """Whether the folder says that it holds an average (`unet_ema`)."""
    return path.parent.name in PARTS and path.parent.name.endswith("_ema")


def is_weights_name(name: str) -> bool:
    """Whether a name is that of a `.safetensors`, in letters of either case, or of an index."""
    return name.endswith(INDEX_SUFFIX) or name.lower().endswith(SUFFIX)


def weights_stem(name: str) -> str:
    """A name without the ending of a `.safetensors` or of an index."""
    plain = name.removesuffix(INDEX_SUFFIX)
    return plain[: -len(SUFFIX)] if plain.lower().endswith(SUFFIX) else plain
