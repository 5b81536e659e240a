"""Weights of networks that the package does not know: as files of a set, and as a module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from merge_rl.errors import CheckpointError
from merge_rl.storage.checkpoints.model_file import save_checkpoint
from merge_rl.storage.files import TensorInfo

_NAME: Final = re.compile(r"[\w][\w.=+-]*")


def keep_states(folder: Path, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write state dicts as the checkpoints of a new folder, by name.

    Raises CheckpointError for a name that is no file's, or what is no tensor;
    NonFiniteWeightsError for weights that are not finite.
    """
    folder.mkdir(parents=True)
    for name, state in states.items():
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"expected letters, digits, '.', '_' and '-', got name {name!r}")
        odd = [key for key, value in state.items() if not isinstance(value, Tensor)]
        if odd or not state:
            found = f"{type(state[odd[0]]).__name__} at {odd[0]!r}" if odd else "nothing"
            raise CheckpointError(f"checkpoint {name}: expected tensors by name, found {found}")
        kept = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_checkpoint(folder / f"{name}.safetensors", kept)


def module_of(tensors: Mapping[str, TensorInfo]) -> nn.Module:
    """A module whose state dict has these names, shapes and types, its values 0; it has no forward.

    What is floating is a parameter, the rest buffers: carried by a merge, not averaged. Raises
    CheckpointError for names that no module's state dict has.
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
            if info.dtype.is_floating_point:
                owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
            else:
                owner.register_buffer(leaf, value)
        except (KeyError, AttributeError):
            raise CheckpointError(f"the tensor name {name!r} is not one of a state dict") from None
    return root
