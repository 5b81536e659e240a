"""Folders as the library diffusers writes them: what its configs say of a network, and back.

A network's folder has a config.json with the class's name, a pipeline the scheduler's beside it; a
training run has such folders in checkpoint-N/unet and the like. Names are data: they are compared
with a fixed list, nothing is imported by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from merge_rl.errors import CheckpointError
from merge_rl.untrusted import load_json_mapping, read_bounded

FAMILY: Final = "diffusers"  # the "model" of a config
CLASSES: Final = ("UNet2DModel", "DiTTransformer2DModel")
SCHEDULER_NAME: Final = "scheduler_config.json"
SCHEDULER_PLACE: Final = f"scheduler/{SCHEDULER_NAME}"  # within a pipeline
# What diffusers' EMAModel writes into the config of its network.
_OF_AVERAGES: Final = frozenset(
    {
        "decay", "min_decay", "inv_gamma", "power", "optimization_step", "update_after_step",
        "use_ema_warmup", "foreach",
    }
)  # fmt: skip


def is_network_config(document: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a network of `CLASSES`, as diffusers writes it."""
    return "model" not in document and document.get("_class_name") in CLASSES


def network_config(
    document: Mapping[str, Any], folder: Path, num_classes: int | None = None
) -> dict[str, Any]:
    """The config of the network in `folder` whose config.json is `document`.

    {"model": "diffusers", "network": its options, "scheduler": the schedule, "num_classes"}. The
    scheduler is looked for in the folder, in the pipeline that the folder lies in, and in the run
    above it. Of a label table the last row is a null class unless the number of rows is a multiple
    of ten, where `num_classes` does not say it; a transformer always has one. Raises
    CheckpointError without a scheduler.
    """
    scheduler = find_scheduler(folder)
    if scheduler is None:
        raise CheckpointError(
            f"{folder}: the network's betas and prediction are not known; expected a "
            f"{SCHEDULER_NAME} in it, in scheduler/ beside it, or in the run above"
        )
    options = {
        key: value
        for key, value in document.items()
        if key == "_class_name" or not (key.startswith("_") or key in _OF_AVERAGES)
    }
    return {
        "model": FAMILY,
        "network": options,
        "scheduler": {k: v for k, v in scheduler.items() if k != "_diffusers_version"},
        "num_classes": _classes(options) if num_classes is None else num_classes,
    }


def find_scheduler(folder: Path) -> dict[str, Any] | None:
    """The scheduler_config.json that goes with the network in `folder`; None if there is none."""
    whole = folder.resolve()
    for place in (whole, *whole.parents[:2]):
        for file in (place / SCHEDULER_NAME, place / SCHEDULER_PLACE):
            if file.is_file():
                return load_json_mapping(read_bounded(file), str(file))
    return None


def is_of_library(config: Mapping[str, Any] | None) -> bool:
    """Whether a config, in our words, is that of a network of diffusers."""
    return config is not None and config.get("model") == FAMILY


def library_documents(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What diffusers reads of such a config: (config.json, scheduler_config.json)."""
    return dict(config["network"]), dict(config["scheduler"])


def _classes(options: Mapping[str, Any]) -> int:
    if options["_class_name"] != "UNet2DModel":
        classes = options.get("num_embeds_ada_norm", 1000)
        return classes if type(classes) is int else 0
    rows = options.get("num_class_embeds")
    if type(rows) is not int:
        return 0
    return rows if rows == 1 or rows % 10 == 0 else rows - 1
