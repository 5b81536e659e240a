"""Networks that diffusers wrote, beside their configs: which of a run's are meant, as what."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_rl.errors import CheckpointError
from merge_rl.storage.checkpoints import is_network_config, library_document, network_config
from merge_rl.storage.convert.contents import Extracted, Hints
from merge_rl.storage.files import averaged, network_name
from merge_rl.storage.pickles import TensorRef


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
