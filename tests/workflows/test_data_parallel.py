"""Gradients over two processes equal those of one, on the embedded network of the digits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from merge_rl.core.training_losses import denoising_loss
from merge_rl.demo.write import write_demo
from merge_rl.workflows.data_parallel import (
    average_scalars,
    process_group,
    replicated,
    sharded,
    whole_gradients,
)
from merge_rl.workflows.learner import trainable
from merge_rl.workflows.models import load_model

BATCH = 8


def loss_of(policy: nn.Module, rows: slice) -> Tensor:
    """The training loss on some rows of one batch."""
    generator = torch.Generator().manual_seed(4)
    data, noise = (torch.randn(BATCH, 1, 8, 8, generator=generator) for _ in range(2))
    sigma = 0.3 + torch.rand(BATCH, generator=generator)
    return denoising_loss(
        policy, data[rows], torch.arange(BATCH)[rows], sigma[rows], noise[rows], sigma_data=0.5
    )


def gradients(model: Path, *, way: str, rows: slice) -> dict[str, Tensor]:
    network = trainable(load_model(model))
    policy = {"alone": lambda n: n, "replicated": replicated, "sharded": sharded}[way](network)
    loss_of(policy, rows).backward()  # type: ignore[no-untyped-call]
    if way == "sharded":
        average_scalars(policy)
    return whole_gradients(policy)


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - grad).norm() / grad.norm().clamp(min=1e-20))
        for name, grad in expected.items()
        if float(grad.norm()) > 0
    )


def in_a_process(model: Path) -> None:
    """What each of two processes does; rank 0 prints how far its gradients are off."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    expected = gradients(model, way="alone", rows=slice(0, BATCH))
    half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    with process_group("cpu"):
        for way in ("replicated", "sharded"):
            off = furthest(gradients(model, way=way, rows=half), expected)
            if rank == 0:
                sys.stdout.write(f"{way} {off:.3e} of {len(expected)}\n")


def test_gradients_equal_those_of_one_process(tmp_path: Path) -> None:
    model = sorted((write_demo(tmp_path)["edm2"] / "raw").iterdir())[-1]
    script = "import sys, pathlib; from tests.workflows import test_data_parallel as t; "
    script += "t.in_a_process(pathlib.Path(sys.argv[1]))"
    (tmp_path / "go.py").write_text(script)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", str(tmp_path / "go.py")]
    ended = subprocess.run(
        [*launcher, str(model)], env=environment, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    lines = [line.split() for line in ended.stdout.splitlines()]
    assert [line[0] for line in lines] == ["replicated", "sharded"]
    assert all(int(line[3]) > 20 for line in lines)
    # The norm of each tensor's difference, relative: the mean of two halves is that of the whole.
    assert all(float(line[1]) < 1e-6 for line in lines), ended.stdout
