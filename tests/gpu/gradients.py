"""What a process of a launch over nccl does in a test."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from merge_rl.core.training_losses import denoising_loss
from merge_rl.parallel import joined
from merge_rl.workflows.data_parallel import (
    average_scalars,
    process_group,
    replicated,
    sharded,
    whole_gradients,
)
from merge_rl.workflows.fast import exact_products
from merge_rl.workflows.learner import trainable
from merge_rl.workflows.models import load_model


def _gradients(model: Path, way: str) -> dict[str, Tensor]:
    network = trainable(load_model(model)).to("cuda")
    policy: nn.Module = {"alone": lambda n: n, "replicated": replicated, "sharded": sharded}[way](
        network
    )
    generator = torch.Generator().manual_seed(4)
    data, noise = (torch.randn(8, 1, 8, 8, generator=generator).cuda() for _ in range(2))
    sigma = (0.3 + torch.rand(8, generator=generator)).cuda()
    labels = torch.arange(8, device="cuda")
    denoising_loss(policy, data, labels, sigma, noise, sigma_data=0.5).backward()  # type: ignore[no-untyped-call]
    if way == "sharded":
        average_scalars(policy)
    return whole_gradients(policy)


def in_a_process(folder: Path) -> None:
    """Print how far the gradients of each way are off those of the network alone."""
    model = max((folder / "edm2/raw").iterdir())
    torch.cuda.set_device(0)
    with exact_products(), joined() as group:
        expected = _gradients(model, "alone")
        with process_group("cuda", group if group.size > 1 else None):
            for way in ("replicated", "sharded"):
                found = _gradients(model, way)
                off = max(
                    float((found[name] - grad).norm() / grad.norm())
                    for name, grad in expected.items()
                    if float(grad.norm()) > 0
                )
                sys.stdout.write(f"off {way} {off:.3e}\n")
