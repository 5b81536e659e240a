"""Gradients over several processes, by torch's own classes: replicated, or sharded.

Every process takes the loss of its share of a batch. `replicated` (DistributedDataParallel) holds
all weights everywhere; `sharded` (FSDP2's fully_shard) holds a part of each in every process and is
for networks that do not fit one device. Both need the default group of torch, see `process_group`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from merge_rl.parallel import Group


@contextmanager
def process_group(device: str, group: Group | None = None) -> Iterator[None]:
    """torch's default group for this launch: nccl between GPUs, gloo for what is on the CPU.

    With `group` its processes meet in its store, which a restarted launch does not share with what
    was before; no exchange waits longer than its timeout.
    """
    kind = "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo"
    if group is None:
        dist.init_process_group(kind)
    else:
        store: Any = group.store_of("gradients")
        dist.init_process_group(
            kind, store=store, rank=group.rank, world_size=group.size,
            timeout=timedelta(seconds=group.timeout),
        )  # fmt: skip
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_broken_link(error: RuntimeError) -> bool:
    """Whether an exchange has failed because of the process at its other end."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


class Replicated(DistributedDataParallel):
    """Says of itself what its network does: samplers ask what it predicts, and of which classes."""

    def __init__(self, network: nn.Module) -> None:
        known = inspect.signature(DistributedDataParallel).parameters
        named = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {named: False}
        super().__init__(network, **options)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def replicated(network: nn.Module) -> nn.Module:
    """The network, with gradients that are means over processes after every backward pass.

    Buffers are constant tables, equal everywhere: nothing is exchanged in forward passes.
    """
    return Replicated(network)


def sharded(network: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    """The network with its weights in shards, in place; scalars, which cannot be, stay whole.

    One block of its lists of blocks is whole at a time, beside what belongs to none of them.

    Gradients of the shards are means over processes after every backward pass; those of the
    scalars once `average_scalars` has been called.
    """
    if mesh is None:
        kind = next(network.parameters()).device.type
        mesh = init_device_mesh(kind, (dist.get_world_size(),))
    whole = {parameter for parameter in network.parameters() if parameter.ndim == 0}
    for block in blocks_of(network):
        fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(network, mesh=mesh, ignored_params=whole)
    return network


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The entries of a network's outermost lists and dictionaries of modules that have weights."""
    found: list[nn.Module] = []
    for child in network.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found += [block for block in child.children() if any(True for _ in block.parameters())]
        else:
            found += blocks_of(child)
    return found


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
