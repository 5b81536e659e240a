"""Weights in memory: sets ready to be merged, merges of files, networks known by tensors alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from merge_rl.core.merging.buffers import (
    Checkpoints,
    FlatCheckpoints,
    FlatLayout,
    Piece,
)
from merge_rl.core.merging.stored_numbers import Raw
from merge_rl.errors import CheckpointError
from merge_rl.storage.checkpoints.checkpoint_set import CheckpointSet
from merge_rl.storage.checkpoints.model_file import save_checkpoint
from merge_rl.storage.checkpoints.one_pass import merge_pass
from merge_rl.storage.checkpoints.plan import MergePlan
from merge_rl.storage.files import TensorInfo

DISK = "disk"


class MappedCheckpoints(Checkpoints):
    """Checkpoints whose tensors stay where they are: views of files mapped into memory.

    What is not in memory is read from disk at every merge.
    """

    def __init__(
        self,
        layout: FlatLayout,
        rows: Sequence[Mapping[str, Tensor]],
        fixed: Mapping[str, Tensor],
    ) -> None:
        super().__init__(layout, fixed)
        self._flat = {name: [row[name].reshape(-1) for row in rows] for name in layout.names}
        self._count = len(rows)

    @property
    def num_checkpoints(self) -> int:
        """Number of checkpoints K."""
        return self._count

    @property
    def device(self) -> torch.device:
        """The CPU: files are mapped there."""
        return torch.device("cpu")

    def pieces(self) -> Iterator[Piece]:
        """One piece a tensor."""
        layout, group = self.layout, 0
        for name, start in zip(layout.names, layout.offsets, strict=True):
            sources = self._flat[name]
            while group + 1 < layout.num_groups and start >= layout.group_bounds[group + 1]:
                group += 1
            yield Piece(start, start + sources[0].numel(), group, sources)


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


_NAME: Final = re.compile(r"[\w][\w.=+-]*")


def keep_states(folder: Path, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write state dicts as the checkpoints of a new folder, by name.

    Raises CheckpointError for a name that is no file's, or what is no tensor;
    NonFiniteWeightsError for weights that are not finite.
    """
    folder.mkdir(parents=True)
    for name, state in states.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise CheckpointError(f"expected letters, digits, '.', '_' and '-', got name {name!r}")
        odd = [k for k, value in state.items() if not isinstance(k, str) or _kind(value)]
        if odd or not state:
            found = f"{_kind(state[odd[0]]) or 'a tensor'} at {odd[0]!r}" if odd else "nothing"
            inner = bool(odd) and isinstance(state[odd[0]], Mapping)
            more = "; hand over one of the state dicts in it, or its file" if inner else ""
            raise CheckpointError(
                f"checkpoint {name}: expected tensors by name, found {found}{more}"
            )
        kept = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_checkpoint(folder / f"{name}.safetensors", kept)


def _kind(value: object) -> str | None:
    """What stands where a plain tensor with numbers should; None where one does."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.is_meta or is_lazy(value):
        return "a tensor without numbers"
    if value.layout != torch.strided or value.is_quantized:
        layout = "a quantized" if value.is_quantized else f"a {value.layout}".replace("torch.", "")
        return f"{layout} tensor"
    return None


def module_of(tensors: Mapping[str, TensorInfo]) -> nn.Module:
    """A module whose state dict has these names, shapes and types, its values 0; it has no forward.

    What is floating or complex is a parameter, the rest buffers: carried by a merge, not averaged.
    Raises CheckpointError for names that no module's state dict has.
    """
    root = nn.Module()
    for name, info in tensors.items():
        value = torch.zeros(info.shape, dtype=info.dtype)
        try:
            *path, leaf = name.split(".")
            owner = root
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            if info.dtype.is_floating_point or info.dtype.is_complex:
                owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
            else:
                owner.register_buffer(leaf, value)
        except (KeyError, AttributeError):
            raise CheckpointError(f"the tensor name {name!r} is not one of a state dict") from None
    return root
