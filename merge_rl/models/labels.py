"""Class ids where they enter a network."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_rl.errors import ConfigError


def require_class_ids(labels: Tensor, count: int) -> None:
    """Raise ConfigError unless labels (B,) on the CPU are class ids in 0..count-1.

    Labels on an accelerator pass unread: looking at them would wait for everything that is queued
    there, in every call of the network. In a compiled network, which is for accelerators, all do.
    """
    if torch.compiler.is_compiling() or labels.device.type != "cpu" or not labels.numel():
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= count:
        odd = low if low < 0 else high
        raise ConfigError(f"expected labels in 0..{count - 1}, found {odd}")
