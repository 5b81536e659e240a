"""Gradients over several processes, by torch's own classes: replicated, or sharded.

Every process takes the loss of its share of a batch. `replicated` (DistributedDataParallel) holds
all weights everywhere; `sharded` (FSDP2's fully_shard) holds a part of each in every process and is
for networks that do not fit one device. Both need the default group of torch, see `process_group`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """torch's default group for this launch: nccl between GPUs, gloo for what is on the CPU."""
    kind = "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo"
    dist.init_process_group(kind)
    try:
        yield
    finally:
        dist.destroy_process_group()


def replicated(network: nn.Module) -> nn.Module:
    """The network, with gradients that are means over processes after every backward pass."""
    return DistributedDataParallel(network)


def sharded(network: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    """The network with its weights in shards, in place; scalars, which cannot be, stay whole.

    Gradients of the shards are means over processes after every backward pass; those of the
    scalars once `average_scalars` has been called.
    """
    if mesh is None:
        kind = next(network.parameters()).device.type
        mesh = init_device_mesh(kind, (dist.get_world_size(),))
    whole = {parameter for parameter in network.parameters() if parameter.ndim == 0}
    fully_shard(network, mesh=mesh, ignored_params=whole)
    return network


def average_scalars(network: nn.Module) -> None:
    """Means over processes of the gradients of a sharded network's scalars."""
    grads = [p.grad for p in network.parameters() if p.ndim == 0 and p.grad is not None]
    if not grads:
        return
    flat = torch.stack(grads)
    dist.all_reduce(flat)
    for grad, mean in zip(grads, flat / dist.get_world_size(), strict=True):
        grad.copy_(mean)


def whole_gradients(network: nn.Module) -> dict[str, Tensor]:
    """Gradients by name, as one process would have them; all processes must call it."""
    found = {}
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            found[name.removeprefix("module.")] = (
                grad.full_tensor() if isinstance(grad, DTensor) else grad
            )
    return found
