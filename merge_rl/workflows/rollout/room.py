"""How many images can be differentiated at a time: what a call of the network keeps for it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from merge_rl.core.merging.live_model import LiveModel
from merge_rl.core.sampling.sampler import sample_with
from merge_rl.core.sampling.solvers import Velocity
from merge_rl.workflows.rollout.rollout import Rollout

BYTES: Final = 2**31  # of activations kept at a time on the CPU
SHARE: Final = 4  # of an accelerator's memory, one part


@dataclass(frozen=True)
class Room:
    """What is kept of the way there at a time."""

    images: int  # in one call of the network
    kept: int  # calls of the network for one image that may all be kept


def room_for(rollout: Rollout, live: LiveModel) -> Room:
    """The room on the rollout's device, from what two images keep more than one does.

    It follows from the network and the size of the device alone, not from what is free at the
    moment: a resumed run sums in the same parts.
    """
    sampler = dataclasses.replace(rollout.sampler, num_steps=2, compile=False, precision="float32")
    short = rollout.with_sampler(sampler)
    one, two = (_kept_bytes(short, live, count) for count in (1, 2))
    each = max(1, two - one)
    room = max(1, _bytes_of(rollout.device) // each)
    return Room(images=min(rollout.batch, room), kept=room)


def _bytes_of(device: torch.device) -> int:
    if device.type != "cuda":
        return BYTES
    return int(torch.cuda.get_device_properties(device).total_memory) // SHARE


def _kept_bytes(rollout: Rollout, live: LiveModel, count: int) -> int:
    """Bytes of one evaluation of the guided network for so many images, the most of any."""
    sizes, calls = dict[int, int](), list[int]()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def through(evaluate: Velocity) -> Velocity:
        def call(x: Tensor, t: Tensor) -> Tensor:
            sizes.clear()
            # Each call alone: what it makes of weights is kept whatever the number of images.
            made = evaluate(x.detach().requires_grad_(True), t)
            calls.append(sum(sizes.values()))
            return made.detach()

        return call

    noise = rollout.noise(range(count)).to(rollout.device)
    labels = torch.zeros(count, dtype=torch.int64, device=rollout.device)
    with (
        live.gradients(),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        sample_with(
            rollout.sampler, rollout.model, noise, labels, guide=rollout.guide, through=through
        )
    return max(calls)
