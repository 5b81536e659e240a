"""What both embedded digits runs are made from: images, splits, and the writing of snapshots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from merge_rl.storage.checkpoints import open_model_file
from merge_rl.storage.checkpoints.manifest import (
    CheckpointEntry,
    Manifest,
    SetDefaults,
    write_manifest,
)
from merge_rl.storage.files.atomic import save_tensors
from merge_rl.storage.files.documents import sha256_file


def load_images() -> tuple[Tensor, Tensor]:
    """All digits: images uint8 (1797, 1, 8, 8) and labels (1797,) int64."""
    data = load_digits()
    # 17 grey levels 0..16 -> 0..255
    images = torch.from_numpy(np.rint(data.images * (255 / 16)).astype(np.uint8))[:, None]
    return images, torch.from_numpy(data.target.astype(np.int64))


def training_rows(labels: Tensor, seed: int = 0, kept_out: int = 60) -> Tensor:
    """Rows the network is trained on: all but `kept_out` of every class."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.ones(len(labels), dtype=torch.bool)
    for digit in range(10):
        rows = (labels == digit).nonzero().flatten()
        kept[rows[torch.randperm(len(rows), generator=generator)[:kept_out]]] = False
    return kept.nonzero().flatten()


def split_in_halves(labels: Tensor, seed: int = 1) -> dict[str, Tensor]:
    """Rows of the two halves; each has half of every class, give or take one."""
    generator = torch.Generator().manual_seed(seed)
    halves: dict[str, list[Tensor]] = {"reference": [], "heldout": []}
    for digit in range(10):
        rows = (labels == digit).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        middle = (len(rows) + digit % 2) // 2
        halves["reference"].append(rows[:middle])
        halves["heldout"].append(rows[middle:])
    return {name: torch.cat(parts).sort().values for name, parts in halves.items()}


def half(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float16 copies, as published snapshots are stored."""
    return {name: tensor.detach().half().cpu().clone() for name, tensor in weights.items()}


def file_of(track: str, nimg: int, ema_std: float | None) -> str:
    """TRACK/digits-KIMG.safetensors, with the EMA width in the name where there is one."""
    suffix = "" if ema_std is None else f"-{ema_std:.3f}"
    return f"{track}/digits-{nimg // 1000:07d}{suffix}.safetensors"


class Snapshots:
    """Writes the checkpoints of a run and keeps their manifest entries."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[CheckpointEntry] = []

    def write(
        self, track: str, nimg: int, weights: dict[str, Tensor], ema_std: float | None = None
    ) -> None:
        """Store weights as `file_of` names them, and note them in the manifest."""
        file = file_of(track, nimg, ema_std)
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, half(weights), {})
        self.entries.append(
            CheckpointEntry(
                file=file, nimg=nimg, ema_std=ema_std, track=track, sha256=sha256_file(path)
            )
        )

    def read(self, track: str, nimg: int, ema_std: float | None = None) -> dict[str, Tensor]:
        """What was stored, in float32."""
        stored = open_model_file(self.folder / file_of(track, nimg, ema_std)).weights
        return {name: tensor.float() for name, tensor in stored.items()}

    def finish(self, name: str, config: Mapping[str, Any], sampler: Mapping[str, Any]) -> None:
        """Write the manifest of all that was written."""
        write_manifest(
            self.folder / "checkpoints_manifest.yaml",
            Manifest(
                model=config,
                name=name,
                licence="Apache-2.0",
                defaults=SetDefaults(
                    extractor="digits",
                    extractor_weights=Path("evaluation/extractor.safetensors"),
                    reference=Path("evaluation/reference.safetensors"),
                    heldout=Path("evaluation/heldout.safetensors"),
                    sampler=sampler,
                ),
                checkpoints=tuple(self.entries),
            ),
        )
