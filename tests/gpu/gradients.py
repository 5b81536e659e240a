"""What a process of a launch over nccl does in a test."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from merge_rl.parallel import joined
from merge_rl.workflows.finetune.sharded import process_group
from merge_rl.workflows.rollout.execution import exact_products
from tests.gradients import BATCH, furthest, gradients


def in_a_process(folder: Path) -> None:
    """Print how far the gradients of each way are off those of the network alone."""
    model, rows = max((folder / "edm2/raw").iterdir()), slice(0, BATCH)
    torch.cuda.set_device(0)
    with exact_products(), joined() as group:
        expected = gradients(model, way="alone", rows=rows, device="cuda")
        with process_group("cuda", group if group.size > 1 else None):
            for way in ("replicated", "sharded"):
                found = gradients(model, way=way, rows=rows, device="cuda")
                sys.stdout.write(f"off {way} {furthest(found, expected):.3e}\n")
