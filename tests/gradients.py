"""Gradients of the digits' networks, alone and among processes, and launches that take them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from merge_rl.core.training_losses import denoising_loss
from merge_rl.workflows.data_parallel import (
    average_scalars,
    replicated,
    sharded,
    whole_gradients,
)
from merge_rl.workflows.learner import trainable
from merge_rl.workflows.models import load_model

BATCH = 8


def loss_of(policy: nn.Module, rows: slice, device: str) -> Tensor:
    """The training loss on some rows of one batch."""
    generator = torch.Generator().manual_seed(4)
    data, noise = (torch.randn(BATCH, 1, 8, 8, generator=generator) for _ in range(2))
    sigma = 0.3 + torch.rand(BATCH, generator=generator)
    parts = (x[rows].to(device) for x in (data, torch.arange(BATCH), sigma, noise))
    return denoising_loss(policy, *parts, sigma_data=0.5)


def gradients(model: Path, *, way: str, rows: slice, device: str = "cpu") -> dict[str, Tensor]:
    """By name, of a network alone, or of one among processes of which each has its rows."""
    network = trainable(load_model(model)).to(device)
    policy = {"alone": lambda n: n, "replicated": replicated, "sharded": sharded}[way](network)
    loss_of(policy, rows, device).backward()  # type: ignore[no-untyped-call]
    if way == "sharded":
        average_scalars(policy)
    return whole_gradients(policy)


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The norm of a tensor's difference, relative: the largest."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - grad).norm() / grad.norm().clamp(min=1e-20))
        for name, grad in expected.items()
        if float(grad.norm()) > 0
    )


def launched(module: str, folder: Path, work: Path, processes: int) -> list[list[str]]:
    """The words of each line that `module`.in_a_process(folder) prints, launched by torchrun."""
    script = f"import pathlib, sys; from {module} import in_a_process; "
    (work / "go.py").write_text(script + "in_a_process(pathlib.Path(sys.argv[1]))")
    paths = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", str(work / "go.py")]
    ended = subprocess.run(
        [*launcher, str(folder)], env=environment, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return [line.split() for line in ended.stdout.splitlines()]
