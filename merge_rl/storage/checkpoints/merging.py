"""Sets of checkpoints in memory or mapped, ready to be merged; merges of files into memory."""

from __future__ import annotations

import numpy.typing as npt
import torch
from torch import Tensor

from merge_rl.core.merging.buffers import (
    Checkpoints,
    FlatCheckpoints,
    FlatLayout,
    MappedCheckpoints,
)
from merge_rl.core.merging.stored_numbers import Raw
from merge_rl.storage.checkpoints.checkpoint_set import CheckpointSet
from merge_rl.storage.checkpoints.one_pass import merge_pass
from merge_rl.storage.checkpoints.plan import MergePlan

DISK = "disk"


def load_checkpoints(
    checkpoints: CheckpointSet, plan: MergePlan, device: str = "cpu", *, network: str = "cpu"
) -> Checkpoints:
    """The set ready to be merged many times: on a device, in memory ("cpu"), or on "disk".

    On disk the files are mapped, after one pass over each that checks hash and values. Merges give
    the same bits wherever the checkpoints lie; in memory it is of a kind that is quickly sent to
    where the `network` is.
    """
    shapes = {name: checkpoints.tensors[name].shape for name in plan.merged}
    layout = FlatLayout.of(shapes, plan.groups)
    if device != DISK:
        return FlatCheckpoints.load(
            checkpoints.read,
            len(checkpoints),
            layout,
            base=plan.base,
            fixed=plan.carried,
            device=torch.device(device),
            pinned=device == "cpu" and torch.device(network).type == "cuda",
        )
    rows = [checkpoints.mapped(index) for index in range(len(checkpoints))]
    fixed = {name: rows[plan.base][name].clone() for name in plan.carried}
    return MappedCheckpoints(layout, rows, fixed)


def merge_into_memory(
    checkpoints: CheckpointSet, plan: MergePlan, coefficients: npt.ArrayLike
) -> dict[str, list[Tensor]]:
    """Name -> P merged tensors, in the order of the set; see `merge_pass`.

    What is floating becomes float32; the rest stays as it is stored.
    """
    count = len(coefficients)  # type: ignore[arg-type]
    found = {
        name: [
            torch.empty(info.shape, dtype=torch.float32 if info.is_floating else info.dtype)
            for _ in range(count)
        ]
        for name, info in checkpoints.tensors.items()
    }
    flat = {name: [t.view(-1).numpy() for t in tensors] for name, tensors in found.items()}

    def put(p: int, name: str, start: int, values: Raw) -> None:
        flat[name][p][start : start + values.size] = values

    merge_pass(checkpoints, plan, coefficients, put)
    return found
